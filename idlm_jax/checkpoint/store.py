"""Our checkpoint: the Hugging Face companion files, ``idlm.json``, and the parameters as an Orbax v1 checkpoint.

``params/`` holds the unstacked tree of the weight table, with layers as a dict keyed "0", "1", …; it is written and
read a batch of tensors at a time. ``idlm.json`` keeps sizes and checksums: Orbax does not notice a changed bit, and
notices a truncated file only when it reads that far.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from idlm_jax.backbone.weights import Weight, flatten, nest, weight_table
from idlm_jax.checkpoint import companions
from idlm_jax.checkpoint.arrays import as_bytes, contiguous
from idlm_jax.checkpoint.atomic import new_directory, require_space
from idlm_jax.checkpoint.source import WeightSource, changed_config, read_each, stored_size, target_dtype
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
MANIFEST = "idlm.json"
PARAMS = "params"
# Tensors saved, or loaded, in one call of Orbax: enough to hide its 30 ms, little enough for the memory limit (loading
# leaves some of its buffers with the allocator).
_SAVE_BYTES = 128 * 2**20
_LOAD_BYTES = 32 * 2**20
# Chunks of one array on disk: larger ones load slower and cost memory, smaller ones make more files.
_CHUNK_BYTES = 64 * 2**20
# Files up to this size (metadata, indices) are checked whole when a checkpoint is opened.
_SMALL_FILE_BYTES = 2**20


class OrbaxSource:
    """A checkpoint of ours, checked against the weight table when opened."""

    kind = "orbax"

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.manifest = _read_manifest(self.path / MANIFEST)
        where = self.path / "config.json"
        self.hf_config: dict[str, Any] = companions.read_json(where)
        self.config = ModelConfig.from_hf(self.hf_config, str(where))
        self._check_files()
        self._dtypes = self._check_tree()

    def read(self, weight: Weight) -> np.ndarray:
        """One tensor in our layout."""
        return self._read_batch([weight])[weight.path]

    def read_each(self, weights: Iterable[Weight]) -> Iterator[np.ndarray]:
        """Tensors in the order asked for, with as few calls of Orbax as memory allows."""

        def size(weight: Weight) -> int:
            return weight.size * self.stored_dtype(weight).itemsize

        for batch in batches(weights, size, _LOAD_BYTES):
            arrays = self._read_batch(batch)
            for weight in batch:
                yield arrays.pop(weight.path)

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """The dtype that ``read`` returns, without reading."""
        return self._dtypes[weight.path]

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with its chat template."""
        return companions.load_tokenizer(self.path)

    def copy_companions(self, target: Path) -> None:
        """Copy configuration, tokenizer and licence files."""
        companions.copy_companions(self.path, target)

    def _check_files(self) -> None:
        """Notice missing, truncated and changed files in one line; Orbax would print pages."""
        for name, (size, checksum) in self.manifest.get("files", {}).items():
            file = self.path / name
            if not file.is_file():
                raise self._damaged(f"{name} is missing")
            if file.stat().st_size != size:
                raise self._damaged(f"{name} has {file.stat().st_size} bytes instead of {size}")
            if checksum is not None and zlib.crc32(file.read_bytes()) != checksum:
                raise self._damaged(f"checksum of {name} differs")

    def _check_tree(self) -> dict[str, np.dtype]:
        """Dtype of every tensor; raises UserError unless the stored tree is that of the weight table."""
        try:
            stored = flatten(ocp.metadata(str(self.path / PARAMS)).metadata)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
            raise self._damaged(error) from None
        expected = {weight.path: weight.shape for weight in weight_table(self.config)}
        for path in sorted(expected.keys() ^ stored.keys()):
            state = "is missing" if path in expected else "is not in a model of this config.json"
            raise UserError(f"{self.path}: {path} {state}; convert the model again")
        for path, shape in expected.items():
            if tuple(stored[path].shape) != shape:
                raise UserError(
                    f"{self.path}: {path} has shape {list(stored[path].shape)}, config.json asks for {list(shape)}"
                )
        return {path: np.dtype(stored[path].dtype) for path in expected}

    def _read_batch(self, batch: list[Weight]) -> dict[str, np.ndarray]:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                tree = ocp.load(str(self.path / PARAMS), nest({weight.path: np.ndarray for weight in batch}))
        except Exception as error:  # as above
            raise self._damaged(error) from None
        arrays = flatten(tree)
        for path, array in arrays.items():
            checksum = self.manifest.get("crc32", {}).get(path)
            if checksum is not None and zlib.crc32(as_bytes(array)) != checksum:
                raise self._damaged(f"checksum of {path} differs")
        return arrays

    def _damaged(self, reason: Exception | str) -> UserError:
        text = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        return UserError(f"{self.path}: damaged or incomplete ({text[:200]}); convert the model again")


def write_orbax(
    source: WeightSource,
    target: str | Path,
    dtype: np.dtype | None = None,
    mask_token_id: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Convert any source into a checkpoint of ours; ``progress`` hears of the bytes written.

    ``dtype`` casts every tensor (default: as stored); ``mask_token_id`` goes into the written config.json.
    """

    def size(weight: Weight) -> int:
        return weight.size * target_dtype(source, weight, dtype).itemsize

    weights = weight_table(source.config)
    checksums: dict[str, int] = {}
    context = ocp.Context()
    # Trained weights hardly compress (a fifth in bfloat16), and inflating them takes longer than reading them.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with new_directory(Path(target), stored_size(source, dtype), overwrite, source.path) as directory, context:
        params = str(directory / PARAMS)
        tensors = read_each(source, weights)
        for batch in batches(weights, size):
            arrays = {}
            for weight in batch:
                array = next(tensors).astype(target_dtype(source, weight, dtype), copy=False)
                arrays[weight.path] = contiguous(array)
                del array  # a transposed copy beside the original, and Orbax's buffers, would be one too many
                checksums[weight.path] = zlib.crc32(as_bytes(arrays[weight.path]))
            written = sum(map(size, batch))
            require_space(directory, written)
            ocp.partial.save(params, nest(arrays))
            progress(written)
        ocp.partial.finalize(params)
        source.copy_companions(directory)
        config = changed_config(source, dtype, mask_token_id)
        if config is not None:
            companions.write_json(directory / "config.json", config)
        companions.write_json(directory / MANIFEST, _manifest(source, checksums, directory))


def batches(
    weights: Iterable[Weight], size: Callable[[Weight], int], limit: int = _SAVE_BYTES
) -> Iterator[list[Weight]]:
    """Cut a series of tensors into runs of at most ``limit`` bytes; a larger tensor is a run of its own."""
    batch: list[Weight] = []
    held = 0
    for weight in weights:
        if batch and held + size(weight) > limit:
            yield batch
            batch, held = [], 0
        batch.append(weight)
        held += size(weight)
    if batch:
        yield batch


def _manifest(source: WeightSource, checksums: dict[str, int], directory: Path) -> dict[str, Any]:
    files = {}
    for file in sorted(path for path in (directory / PARAMS).rglob("*") if path.is_file()):
        size = file.stat().st_size
        # The data itself is checked tensor by tensor.
        checksum = zlib.crc32(file.read_bytes()) if size <= _SMALL_FILE_BYTES else None
        files[str(file.relative_to(directory))] = [size, checksum]
    try:
        ours = version("idlm_jax")
    except PackageNotFoundError:
        ours = "unknown"
    return {
        "format_version": FORMAT_VERSION,
        "idlm_jax": ours,
        "converted_from": source.kind,
        "files": files,
        "crc32": checksums,
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = companions.read_json(path)
    found = manifest.get("format_version")
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{path}: no format_version; not a checkpoint of idlm_jax")
    if found > FORMAT_VERSION:
        raise UserError(f"{path}: format version {found} is newer than this idlm_jax reads ({FORMAT_VERSION}); upgrade")
    return manifest
