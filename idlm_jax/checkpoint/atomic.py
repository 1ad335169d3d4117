"""Directories and files appear whole or not at all: written under a temporary name beside the target, then renamed."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from idlm_jax.errors import UserError

# What a directory must hold for --overwrite to delete it.
_CHECKPOINT_MARKS = ("idlm.json", "config.json", "adapter_config.json")
# Room for the small files beside the weights.
_SLACK_BYTES = 32 * 2**20


@contextmanager
def new_directory(target: Path, size: int, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``target`` when the block ends well, and disappears when it does not.

    Refuses up front a target that exists (unless ``overwrite``, and then anything but a checkpoint, and ``source``
    itself) and a disk without room for ``size`` bytes.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite, source)
    made = _make_parents(target.parent)
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        _check_space(target, size)
        temporary.mkdir()
        yield temporary
        _replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            parent.rmdir()
        if is_disk_full(error):
            raise UserError(
                f"{target}: the disk is full; nothing was left behind, free some space and repeat"
            ) from None
        if isinstance(error, PermissionError):
            raise UserError(f"{target}: cannot write here: {error.strerror}") from None
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or, if the process ends meanwhile, as it was before."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_space(directory: Path, size: int) -> None:
    """Raise the error of a full disk when ``size`` bytes more do not fit: Orbax would print pages before it says so."""
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that the disk is full; TensorStore says so in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def gigabytes(size: float) -> str:
    """A size as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _check_target(target: Path, overwrite: bool, source: Path | None) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{target} exists already; give another target, or --overwrite to replace it")
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target} is not a directory; give another target")
    if any(target.iterdir()) and not any((target / mark).is_file() for mark in _CHECKPOINT_MARKS):
        raise UserError(f"{target} does not hold a checkpoint, so it is not overwritten; give another target")
    if source is not None and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{target} holds the source itself; give another target")


def _make_parents(directory: Path) -> list[Path]:
    """Create a directory and its parents; returns those that were missing, deepest first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {directory}: {error.strerror}") from None
    return missing


def _check_space(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size + _SLACK_BYTES:
        raise UserError(
            f"not enough disk space for {target}: it needs {gigabytes(size + _SLACK_BYTES)}, {gigabytes(free)} are free"
        )


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_name(temporary.name + "-old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
