"""Checkpoints of a run: Orbax writes them in the background, checksums say later whether one is still whole.

Orbax does not notice a changed byte, and prints pages about a truncated file; so each finished checkpoint gets a
``checksums.json``, written last, and at a resume the newest checkpoint that agrees with its own is taken.
"""

import errno
import json
import logging
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from idlm_jax.checkpoint.atomic import gigabytes, is_disk_full, require_space, write_file
from idlm_jax.checkpoint.companions import read_json
from idlm_jax.errors import UserError
from idlm_jax.training.config import CheckpointSettings

CHECKSUMS = "checksums.json"
# What Orbax calls a checkpoint that is not finished, after its step.
_UNFINISHED = ".orbax-checkpoint-tmp"
# Checkpoints of more than this are announced when the run waits for them.
_LARGE_BYTES = 2**30
# What the files of a checkpoint turned out to be.
_WHOLE, _WITHOUT_CHECKSUMS, _DAMAGED = range(3)


class Checkpoints:
    """The checkpoints of one run, a context manager. All processes call all methods, from their main threads."""

    def __init__(self, output: Path, settings: CheckpointSettings, fingerprint: Mapping[str, Any]):
        """Open ``output``/checkpoints, made if missing; what a killed save left there is removed.

        ``fingerprint`` is JSON that must be the same for a checkpoint to fit this run, such as the model's shape.
        """
        self.directory = Path(os.path.abspath(output)) / "checkpoints"
        self._fingerprint = dict(fingerprint)
        self._sealing: threading.Thread | None = None
        self._failed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {self.directory}: {error.strerror}") from None
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        context = ocp.Context()
        # Trained weights hardly compress, and inflating them takes longer than reading them.
        context.array.saving.use_compression = False
        keep = ocp.training.preservation_policies
        best = keep.BestN(
            get_metric_fn=lambda metrics: metrics["metric"],
            n=settings.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        policy: Any = keep.AnyPreservationPolicy([keep.LatestN(settings.keep_last), best])
        self._orbax = ocp.training.Checkpointer(
            str(self.directory), context=context, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # Whoever interrupts does not want to wait for a save.
        if kind is not KeyboardInterrupt:
            self.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order; one that is being saved is not."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def save(self, step: int, state: Any, data: Any, metric: float | None = None, wait: bool = False) -> None:
        """Begin to save ``state``, a pytree of arrays, and the position of ``data``, a Grain iterator.

        Both may change as soon as this returns. ``metric`` (larger is better) decides which checkpoints are the best.
        A save that fails is told on stderr and the run goes on. ``wait`` until it is done; a step that is there
        already is left as it is.
        """
        self._settle()
        if step not in self.steps:
            self._start(step, state, data, metric)
        if wait:
            self.wait()

    def restore(self, abstract_state: Any, data: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that is whole, with ``data`` set to its position; None without one.

        ``abstract_state`` is the state with a ``jax.ShapeDtypeStruct`` for each array; its shardings may be those of
        another mesh. Damaged checkpoints are named on stderr and moved aside. Raises UserError for one of another run.
        """
        self._settle()
        for step in reversed(self.steps):
            condition, problem = self._check(step)
            try:
                if condition != _DAMAGED:
                    return step, self._load(step, abstract_state, data)
            except UserError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
                if condition == _WHOLE:
                    raise
                problem = _reason(error)
            self._move_aside(step, problem)
        return None

    def wait(self) -> None:
        """Return when what is being saved is on disk, with its checksums."""
        if self._sealing and self._sealing.is_alive():
            _tell_if_large("waiting for the checkpoint to be written", self._saving_bytes)
        self._settle()

    def close(self) -> None:
        """Wait, and release what Orbax holds."""
        self.wait()
        self._orbax.close()
        logging.getLogger("absl").removeFilter(_is_not_from_orbax)

    def _start(self, step: int, state: Any, data: Any, metric: float | None) -> None:
        self._saving_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        # Asked before, because a disk that fills up meanwhile costs the time of a save.
        if not _agreed(jax.process_index() != 0 or _has_room(self.directory, self._saving_bytes)):
            return self._tell_failure(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        metadata: dict[str, Any] = {
            "fingerprint": _as_json(self._fingerprint),
            "state": _describe(state),
            # The same on every process, so that any number of them can go on.
            "data": data.get_state(),
        }
        try:
            response = self._orbax.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                metrics=None if metric is None else {"metric": float(metric)},
                custom_metadata=metadata,
            )
        except Exception as error:  # TensorStore says in words only that a disk is full
            if not isinstance(error, OSError) and not is_disk_full(error):
                raise
            self._failed = True
            return self._tell_failure(step, error)
        self._sealing = threading.Thread(target=self._seal, args=(step, response), name=f"checkpoint-{step}")
        self._sealing.start()

    def _seal(self, step: int, response: Any) -> None:
        """Beside the run: wait for Orbax, then write the checksums, or say what went wrong and tidy up."""
        path = self.directory / str(step)
        try:
            response.result()
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._failed = True
            if not path.is_dir():
                return self._tell_failure(step, error)
            _tell(f"checkpoint {step} is saved, but older ones could not be removed ({_reason(error)})")
        if jax.process_index() == 0:
            try:
                write_file(path / CHECKSUMS, json.dumps(_checksums(path), indent=1))
            except OSError as error:
                _tell(f"checkpoint {step} is saved, but not its checksums ({_reason(error)})")

    def _settle(self) -> None:
        """Wait for the save in progress; after a failed one, have Orbax look again at what is there."""
        if self._sealing:
            self._sealing.join()
            self._sealing = None
        if self._failed:
            with suppress(Exception):  # raised once in every thread; it has been told
                self._orbax.wait()
            self._orbax.reload()
            self._failed = False

    def _tell_failure(self, step: int, error: Exception) -> None:
        for partial_directory in self.directory.glob(f"{step}{_UNFINISHED}*"):
            shutil.rmtree(partial_directory, ignore_errors=True)
        last = f"the last one is of step {self.steps[-1]}" if self.steps else "there is none yet"
        reason = "the disk is full" if is_disk_full(error) else _reason(error)
        _tell(f"checkpoint {step} could not be saved ({reason}); training goes on, {last}: {self.directory}")

    def _check(self, step: int) -> tuple[int, str]:
        """Whether the files of a checkpoint agree with their checksums, and what is wrong; found out by one process."""
        problem = ""
        condition = _WITHOUT_CHECKSUMS
        path = self.directory / str(step)
        if jax.process_index() == 0 and (path / CHECKSUMS).is_file():
            _tell_if_large(f"checking checkpoint {step}", _size(path))
            problem = _difference(path)
            condition = _DAMAGED if problem else _WHOLE
        return _agreed(condition), problem

    def _load(self, step: int, abstract_state: Any, data: Any) -> Any:
        metadata = self._orbax.metadata(step).custom_metadata
        if not isinstance(metadata, dict) or metadata.keys() != {"fingerprint", "state", "data"}:
            raise UserError(f"{self.directory / str(step)} is not a checkpoint of `idlm train`; give another output")
        for theirs, ours in (
            (metadata["fingerprint"], _as_json(self._fingerprint)),
            (metadata["state"], _describe(abstract_state)),
        ):
            difference = _first_difference(theirs, ours)
            if difference:
                raise UserError(
                    f"{self.directory / str(step)} is a checkpoint of another run: {difference}; resume with the "
                    "settings it was made with, or give another output"
                )
        state = self._orbax.load_checkpointables(step, {"state": abstract_state})["state"]
        data.set_state(metadata["data"])
        return state

    def _move_aside(self, step: int, problem: str) -> None:
        path = self.directory / str(step)
        aside = path.with_name(f"damaged-{step}")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved {aside.name}")
        self._orbax.reload()
        _tell(f"checkpoint {step} is damaged ({problem}); moved to {aside}, trying the one before")


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Failed saves are told in one line here; Orbax would print several tracebacks for each."""
    return record.levelno < logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


def _agreed(value: int) -> int:
    """The value of process 0, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else int(value)


def _has_room(directory: Path, size: int) -> bool:
    try:
        require_space(directory, size)
    except OSError:
        return False
    return True


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in _files(checkpoint))


def _checksums(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file."""
    files = _files(checkpoint)
    with ThreadPoolExecutor() as pool:
        values = pool.map(_crc32, files)
        return {
            path.relative_to(checkpoint).as_posix(): (path.stat().st_size, crc)
            for path, crc in zip(files, values, strict=True)
        }


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        for block in iter(partial(file.read, 2**20), b""):
            value = zlib.crc32(block, value)
    return value


def _difference(checkpoint: Path) -> str:
    """The first file that is not what it was when the checksums were written, or an empty string."""
    try:
        expected = read_json(checkpoint / CHECKSUMS)
        sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in _files(checkpoint)}
        for name, (size, _) in expected.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != size:
                return f"{name} has {sizes[name]} bytes instead of {size}"
        found = _checksums(checkpoint)
        return next((f"checksum of {name} differs" for name in expected if found[name][1] != expected[name][1]), "")
    except (OSError, TypeError, ValueError, UserError) as error:
        return _reason(error)


def _as_json(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def _describe(state: Any) -> dict[str, str]:
    """Shape and dtype of every array by its path."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _first_difference(theirs: Any, ours: Any, name: str = "") -> str:
    """In words, where two JSON values first differ, or an empty string."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in (*ours, *(key for key in theirs if key not in ours)):
            inner = f"{name}.{key}" if name else key
            if key not in theirs:
                return f"{inner} is not in it"
            if key not in ours:
                return f"{inner} is in it, but not in this run"
            difference = _first_difference(theirs[key], ours[key], inner)
            if difference:
                return difference
        return ""
    return "" if theirs == ours else f"{name} is {_short(theirs)} there, here {_short(ours)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _tell(line: str) -> None:
    """One line on stderr, once for all processes, above a progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


def _tell_if_large(what: str, size: int) -> None:
    if size > _LARGE_BYTES:
        _tell(f"{what} ({gigabytes(size)}) …")
