"""Safetensors files, one tensor at a time: the library checks a file, the bytes are read and written here.

The library maps a whole file when reading and wants all tensors of a file in memory when writing; conversion must hold
one tensor at most. The format is an 8-byte length, a JSON header, and the data.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from idlm_jax.checkpoint.arrays import as_bytes, contiguous
from idlm_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Rows of a transposed tensor are made contiguous this many bytes at a time.
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    # Name of its dtype in the safetensors format, not necessarily one of DTYPES.
    dtype_name: str
    shape: tuple[int, ...]
    # First byte, from the start of the file.
    offset: int

    def read(self) -> np.ndarray:
        """The whole tensor; the file is not mapped, so its pages do not count as this process's memory."""
        return self._bytes(0, self.nbytes).view(DTYPES[self.dtype_name]).reshape(self.shape)

    def read_part(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of the tensor; only the pages of the file that hold it are read."""
        whole = np.memmap(self.file, DTYPES[self.dtype_name], "r", self.offset, self.shape)
        return np.array(whole[index])

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype_name].itemsize

    def equals(self, other: "StoredTensor") -> bool:
        """Whether two tensors hold the same bytes; reads a block at a time."""
        if (self.dtype_name, self.shape) != (other.dtype_name, other.shape):
            return False
        return all(
            np.array_equal(self._bytes(start, _BLOCK_BYTES), other._bytes(start, _BLOCK_BYTES))
            for start in range(0, self.nbytes, _BLOCK_BYTES)
        )

    def _bytes(self, start: int, count: int) -> np.ndarray:
        count = min(count, self.nbytes - start)
        try:
            data = np.fromfile(self.file, np.uint8, count, offset=self.offset + start)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror}") from None
        if data.size != count:
            raise UserError(f"{self.file}: shorter than its header says; download or copy it again")
        return data


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises UserError when the file is missing, truncated or not safetensors."""
    try:
        with safe_open(file, "numpy"):  # checks the header, and that it covers the file exactly
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UserError(f"cannot read {file}: No such file or directory") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged or truncated ({_explain(file, error)}); download or copy it again") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]


def write_file(file: Path, layout: Layout, read: Callable[[str], np.ndarray]) -> Iterator[int]:
    """Write tensors of the dtypes and shapes of ``layout``, asking for each in ``file_order``; yields their sizes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in file_order(layout):
        dtype, shape = layout[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in file_order(layout):
            array = read(name)
            if (array.dtype, array.shape) != layout[name]:
                raise ValueError(f"{name}: {array.dtype} {array.shape} is not what was announced: {layout[name]}")
            yield _write_array(stream, array)
            del array  # before the next one is read


def file_order(layout: Layout) -> list[str]:
    """The library's own order: widest dtype first (alignment), then by name."""
    rank = list(DTYPES.values()).index
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, rank(layout[name][0]), name))


def _write_array(stream: BinaryIO, array: np.ndarray) -> int:
    if array.flags.c_contiguous:
        stream.write(as_bytes(array))
    else:
        rows = max(1, _BLOCK_BYTES * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            stream.write(as_bytes(contiguous(array[start : start + rows])))
    return array.nbytes


def _explain(file: Path, error: Exception) -> str:
    with file.open("rb") as stream:
        if stream.read(24) == b"version https://git-lfs.":
            return "it is a Git LFS pointer, not the file itself"
    return " ".join(str(error).split())
