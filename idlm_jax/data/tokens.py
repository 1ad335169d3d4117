"""The token store: documents as token ids with a loss mask, written once, in pieces that survive a kill, and read at
random.

A directory with three flat zarr3 arrays, written and read by TensorStore, and ``store.json``, which says what is in
them, from which sources, and by which tokenizer.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import tensorstore as ts
from jaxtyping import Bool, Int, Int32, Int64

from idlm_jax.checkpoint.atomic import is_disk_full, require_space
from idlm_jax.checkpoint.companions import read_json, write_json
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
MANIFEST = "store.json"
ARRAYS = ("tokens", "loss_mask", "offsets")
# Entries of a chunk, a file of its own: 1 MiB of 32-bit tokens. A document is read by inflating its chunk, half a
# millisecond, unless the chunk is in the cache.
CHUNK = 2**18
_CACHE_BYTES = 256 * 2**20
_PROGRESS = "progress.json"
_STORE = "store"


class Document(NamedTuple):
    """One document of L tokens."""

    tokens: Int32[np.ndarray, " L"]
    # True: this token is a target, so the row before it carries loss.
    loss_mask: Bool[np.ndarray, " L"]


class TokenStore:
    """A finished store, open for random access; many threads may read at once."""

    def __init__(self, path: Path, metadata: dict[str, Any], arrays: dict[str, ts.TensorStore]):
        self.path = path
        # What store.json holds: vocab_size, tokenizer_hash, counts, sources, settings.
        self.metadata = metadata
        self._arrays = arrays
        self._offsets: Int64[np.ndarray, " documents_plus_1"] = self._read_offsets()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store; raises UserError for one that is missing, damaged, of another version, or empty."""
        path = Path(path).expanduser()
        if not (path / MANIFEST).is_file():
            unfinished = f"the write in {partial_path(path)} is not finished"
            advice = unfinished if partial_path(path).is_dir() else "`idlm data prepare` makes one"
            raise UserError(f"{path}: no token store here (no {MANIFEST}); {advice}")
        metadata = _check_manifest(read_json(path / MANIFEST), path)
        counts = metadata["counts"]
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        arrays = {}
        for name in ARRAYS:
            if _stored_bytes(path / name) != metadata["bytes"][name]:
                raise _damaged(path, f"{name} has {_stored_bytes(path / name)} bytes, not {metadata['bytes'][name]}")
            try:
                arrays[name] = ts.open(_spec(path / name), open=True, context=context).result()
            except Exception as error:  # TensorStore raises many kinds for a damaged directory
                raise _damaged(path, error) from None
            expected = counts["documents"] + 1 if name == "offsets" else counts["tokens"]
            if arrays[name].shape != (expected,):
                raise _damaged(path, f"{name} has {arrays[name].shape} entries, not {expected}")
        return cls(path, metadata, arrays)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Document:
        """One document; raises UserError where its part of the store is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, stop = self._offsets[index : index + 2]
        reads = [self._arrays[name][start:stop].read() for name in ("tokens", "loss_mask")]
        try:
            tokens, loss_mask = (read.result() for read in reads)
        except Exception as error:  # as above
            raise _damaged(self.path, error) from None
        return Document(tokens.astype(np.int32), loss_mask)

    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of every document."""
        return np.diff(self._offsets)

    def _read_offsets(self) -> np.ndarray:
        try:
            offsets = self._arrays["offsets"].read().result()
        except Exception as error:  # as above
            raise _damaged(self.path, error) from None
        if offsets[0] != 0 or offsets[-1] != self.metadata["counts"]["tokens"] or (np.diff(offsets) <= 0).any():
            raise _damaged(self.path, "its offsets do not rise from 0 to the number of tokens")
        return offsets


class TokenStoreWriter:
    """A context manager that writes a store; it appears at ``target`` when ``finish`` is called, and not before.

    What ``flush`` wrote survives a kill, in ``<target>.partial``: a writer with ``resume`` goes on after the last
    flush. Documents appended after it are gone then; ``state`` tells the caller where that was.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        settings: Mapping[str, Any],
        resume: bool = False,
    ):
        """Start a store, or with ``resume`` go on with an interrupted one if there is one.

        ``settings`` is whatever decides on the documents (JSON); a write is resumed with equal settings only. Raises
        UserError for a target that exists, an interrupted write that is not to be resumed, was made with other
        settings or is being written, and a place that cannot be written to.
        """
        self.target = Path(os.path.abspath(Path(target).expanduser()))
        self.partial = partial_path(self.target)
        if self.target.exists() or self.target.is_symlink():
            raise UserError(f"{self.target} exists already; give another target")
        identity = {"vocab_size": vocab_size, "tokenizer_hash": tokenizer_hash, "settings": dict(settings)}
        # Exactly what JSON gives back, so that the comparison at resume compares like with like.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self._buffer: list[Document] = []
        self._finished = False
        found = self._make_partial(resume)
        self._lock = self._take_lock()
        try:
            self._arrays = self._resume() if found else self._start()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go; an unfinished write keeps what was flushed, and nothing at all if no document was."""
        if not self._finished and self.documents == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    @property
    def documents(self) -> int:
        """Documents that would survive a kill."""
        return self._counts["documents"]

    @property
    def pending_tokens(self) -> int:
        """Tokens appended since the last flush; a flush at every few ``CHUNK`` of them wastes little."""
        return sum(len(document.tokens) for document in self._buffer)

    @property
    def state(self) -> dict[str, Any]:
        """What the last flush was given, also that of an interrupted write; empty before the first."""
        return self._state

    def append(self, tokens: Int[np.ndarray, " L"], loss_mask: Bool[np.ndarray, " L"]) -> None:
        """Add a document; raises ValueError for an empty one, ids outside the vocabulary or a mask of other length."""
        tokens, loss_mask = np.asarray(tokens), np.asarray(loss_mask, bool)
        if tokens.ndim != 1 or not len(tokens) or tokens.shape != loss_mask.shape:
            raise ValueError(f"a document of shape {tokens.shape} with a loss mask of shape {loss_mask.shape}")
        if tokens.min() < 0 or tokens.max() >= self._identity["vocab_size"]:
            raise ValueError(f"token ids {tokens.min()} … {tokens.max()} leave the vocabulary")
        self._buffer.append(Document(tokens.astype(self._dtype), loss_mask))

    def flush(self, state: Mapping[str, Any]) -> None:
        """Make what was appended safe, together with ``state`` (small, JSON): both or neither survive a kill.

        Raises UserError when the disk is full; what earlier flushes wrote is kept.
        """
        counts = dict(self._counts)
        if self._buffer:
            tokens = np.concatenate([document.tokens for document in self._buffer])
            loss_mask = np.concatenate([document.loss_mask for document in self._buffer])
            ends = counts["tokens"] + np.cumsum([len(document.tokens) for document in self._buffer])
            try:
                require_space(self.partial, tokens.nbytes + loss_mask.nbytes + ends.nbytes)
                writes = [
                    self._extend("tokens", counts["tokens"], tokens),
                    self._extend("loss_mask", counts["tokens"], loss_mask),
                    self._extend("offsets", counts["documents"] + 1, ends),
                ]
                for write in writes:
                    write.result()
            except Exception as error:  # TensorStore raises ValueError for most
                raise self._cannot_write(error) from error
            counts["documents"] += len(self._buffer)
            counts["tokens"] += len(tokens)
            counts["target_tokens"] += int(loss_mask.sum())
        self._save_progress(counts, json.loads(json.dumps(dict(state))))
        self._buffer.clear()

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Flush, write ``store.json`` and let the store appear at its target.

        ``metadata`` (JSON) goes into ``store.json``: sources, note, and further ``counts`` beside ours. Raises
        UserError for a store without a document.
        """
        self.flush(self._state)
        if not self.documents:
            raise UserError(f"{self.target}: not one document to write; look at the sources and settings")
        store = self.partial / _STORE
        sizes = {name: _stored_bytes(store / name) for name in ARRAYS}
        counts = {**self._counts, **metadata.get("counts", {})}
        head = {"format_version": FORMAT_VERSION, "idlm_jax": _our_version(), **self._identity}
        try:
            write_json(store / MANIFEST, {**head, **metadata, "counts": counts, "bytes": sizes})
            store.rename(self.target)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._finished = True
        shutil.rmtree(self.partial, ignore_errors=True)

    def _make_partial(self, resume: bool) -> bool:
        """Whether there is an interrupted write to resume; makes the directory of a new one if not."""
        if (self.partial / _PROGRESS).is_file():
            if not resume:
                raise UserError(f"{self.partial} holds an interrupted write of this store; resume it, or delete it")
            return True
        try:
            # A kill before the first progress file leaves a directory with nothing of worth.
            if self.partial.is_dir() and set(os.listdir(self.partial)) <= {_STORE}:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{self.partial} is in the way; delete it, or give another target") from None
        except OSError as error:
            raise UserError(f"cannot create {self.partial}: {error.strerror}") from None
        return False

    def _take_lock(self) -> int:
        lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise UserError(f"{self.partial} is being written by another process; wait for it, or stop it") from None
        return lock

    def _start(self) -> dict[str, ts.TensorStore]:
        store = self.partial / _STORE
        dtypes = {"tokens": self._dtype, "loss_mask": np.dtype(bool), "offsets": np.dtype(np.int64)}
        self._counts = {"documents": 0, "tokens": 0, "target_tokens": 0}
        try:
            arrays = {name: ts.open(_spec(store / name, dtypes[name]), create=True).result() for name in ARRAYS}
            self._arrays = arrays
            self._extend("offsets", 0, np.zeros(1, np.int64)).result()
        except Exception as error:
            raise self._cannot_write(error) from error
        self._save_progress(self._counts, {})
        return arrays

    def _resume(self) -> dict[str, ts.TensorStore]:
        again = f"delete {self.partial} to start again"
        try:
            progress = read_json(self.partial / _PROGRESS)
            identity, self._counts, self._state = (progress[key] for key in ("identity", "counts", "state"))
            lengths = {"tokens": self._counts["tokens"], "loss_mask": self._counts["tokens"]}
            lengths["offsets"] = self._counts["documents"] + 1
        except (UserError, KeyError, TypeError):
            raise UserError(f"{self.partial} is damaged; {again}") from None
        if identity != self._identity:
            raise UserError(
                f"{self.partial} was begun with another {_first_difference(identity, self._identity)}; "
                f"repeat that command, or {again}"
            )
        arrays = {}
        try:
            for name in ARRAYS:
                array = ts.open(_spec(self.partial / _STORE / name), open=True).result()
                # A kill in the midst of a flush left more than was promised.
                arrays[name] = array.resize(exclusive_max=[lengths[name]], shrink_only=True).result()
        except Exception as error:  # TensorStore raises many kinds for a damaged directory
            raise UserError(f"{self.partial} is damaged ({_one_line(error)}); {again}") from None
        return arrays

    def _extend(self, name: str, start: int, values: np.ndarray) -> ts.WriteFutures:
        """Begin to write values behind the first ``start`` ones."""
        stop = start + len(values)
        self._arrays[name] = self._arrays[name].resize(exclusive_max=[stop], expand_only=True).result()
        return self._arrays[name][start:stop].write(values)

    def _save_progress(self, counts: dict[str, int], state: dict[str, Any]) -> None:
        temporary = self.partial / (_PROGRESS + ".new")
        try:
            write_json(temporary, {"identity": self._identity, "counts": counts, "state": state})
            temporary.replace(self.partial / _PROGRESS)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._counts, self._state = counts, state

    def _cannot_write(self, error: Exception) -> UserError:
        reason = "the disk is full" if is_disk_full(error) else f"cannot write here ({_one_line(error)})"
        kept = f"the {self.documents} documents in {self.partial} are safe" if self.documents else "nothing was written"
        return UserError(f"{self.target}: {reason}; {kept}, mend that and run the command again")


def partial_path(target: Path) -> Path:
    """Where an unfinished store lies."""
    return target.with_name(target.name + ".partial")


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of the canonical tokenizer.json; raises UserError for a tokenizer of no such form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json form; use a fast tokenizer of this model")
    content = json.loads(backend.to_str())
    # How the tokenizer was last called, not what it is.
    for key in ("truncation", "padding"):
        content.pop(key, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_tokenizer(metadata: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", where: str | Path) -> None:
    """Raise UserError unless the store of this metadata, at ``where``, was made with this tokenizer."""
    if metadata["tokenizer_hash"] != tokenizer_hash(tokenizer):
        raise UserError(
            f"{where}: this store was made with the tokenizer of another model, so its token ids mean other words; "
            "prepare it again with this one's"
        )


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest id that the tokenizer gives."""
    return max(tokenizer.get_vocab().values()) + 1


def _spec(path: Path, dtype: np.dtype | None = None) -> dict[str, Any]:
    """The TensorStore spec of an array; with a dtype, of one to create."""
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        # A chunk that is missing is damage, not zeros; so chunks of zeros have to be stored.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": "open",
    }
    if dtype is not None:
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}, {"name": "crc32c"}]
        grid = {"name": "regular", "configuration": {"chunk_shape": [CHUNK]}}
        spec["metadata"] = {"shape": [0], "data_type": dtype.name, "chunk_grid": grid, "codecs": codecs}
    return spec


def _stored_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _check_manifest(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    found = metadata.get("format_version")
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{path / MANIFEST}: no format_version; not a token store of idlm_jax")
    if found > FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {found} is newer than this idlm_jax reads ({FORMAT_VERSION}); upgrade idlm_jax"
        )
    counts, sizes = metadata.get("counts"), metadata.get("bytes")
    wanted = ("documents", "tokens", "target_tokens")
    if not (
        isinstance(metadata.get("tokenizer_hash"), str)
        and isinstance(counts, dict)
        and all(isinstance(counts.get(key), int) for key in wanted)
        and isinstance(sizes, dict)
        and all(isinstance(sizes.get(name), int) for name in ARRAYS)
    ):
        raise _damaged(path, f"{MANIFEST} lacks entries")
    if counts["documents"] < 1:
        raise UserError(f"{path}: the token store is empty; prepare one with documents in it")
    return metadata


def _damaged(path: Path, reason: Exception | str) -> UserError:
    return UserError(f"{path}: the token store is damaged or incomplete ({_one_line(reason)}); make it again")


def _one_line(reason: Exception | str) -> str:
    return " ".join(str(reason).split())[:200] or type(reason).__name__


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The name of the first setting that differs, with both values where they are short."""
    flat = [{**identity, **identity.get("settings", {})} for identity in (old, new)]
    name = next(key for key in {**flat[0], **flat[1]} if key != "settings" and flat[0].get(key) != flat[1].get(key))
    values = [str(settings.get(name)) for settings in flat]
    return f"{name} ({values[0]}, now {values[1]})" if max(map(len, values)) <= 40 else name


def _our_version() -> str:
    try:
        return version("idlm_jax")
    except PackageNotFoundError:
        return "unknown"
