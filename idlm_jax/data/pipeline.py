"""Batches for training: a Grain pipeline that shuffles documents, packs them into rows, and can be checkpointed.

A document is never split, and never crosses a row; `segment_ids` and `positions` tell the documents of a row apart.

Every process packs all documents, by their lengths alone, and reads those of the rows that it needs. So rows and the
position in the data are the same for any number of processes.
"""

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Int64

from idlm_jax.data.tokens import Document
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    import grain

# Rows packed at a time: more waste less room and take longer to read again at a resume. With documents of all lengths
# up to nine tenths of a row, 8 fill 83 % of it, 64 fill 90 %, 128 fill 92 %.
_ROWS_PACKED = 128
# Threads that read documents.
_READ_THREADS = 4


class Documents(Protocol):
    """A TokenStore, or a part of one."""

    path: Path
    metadata: dict[str, Any]

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def __getitem__(self, index: int) -> Document:
        """One document."""
        ...

    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of every document."""
        ...


class DocumentView:
    """Some documents of a store, by their numbers."""

    def __init__(self, documents: Documents, numbers: Int64[np.ndarray, " chosen"]):
        self.path = documents.path
        self.metadata = documents.metadata
        self._documents = documents
        self._numbers = numbers

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> Document:
        """One document."""
        return self._documents[int(self._numbers[index])]

    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of every document."""
        return self._documents.lengths()[self._numbers]


class JoinedDocuments:
    """The documents of several stores, one store after the other."""

    def __init__(self, stores: Sequence[Documents]):
        self.path = stores[0].path
        self._stores = stores
        self._ends = np.cumsum([len(store) for store in stores])
        targets = sum(store.metadata["counts"]["target_tokens"] for store in stores)
        self.metadata: dict[str, Any] = {"counts": {"target_tokens": targets}}

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        """One document."""
        store = int(np.searchsorted(self._ends, index, side="right"))
        return self._stores[store][index - int(self._ends[store - 1] if store else 0)]

    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of every document."""
        return np.concatenate([store.lengths() for store in self._stores])


def held_out_split(documents: Documents, held_out: int | float, seed: int) -> tuple[DocumentView, DocumentView]:
    """Two parts without a common document, for training and held out; the same ones for the same seed.

    ``held_out`` is a number of documents, or as a float a share of all. Raises UserError unless both parts get some.
    """
    total = len(documents)
    count = math.ceil(held_out * total) if isinstance(held_out, float) else held_out
    if not 0 < count < total:
        raise UserError(
            f"cannot hold out {held_out} of the {total} documents in {documents.path}: both parts need some"
        )
    order = np.random.default_rng(seed).permutation(total)
    return DocumentView(documents, np.sort(order[count:])), DocumentView(documents, np.sort(order[:count]))


class _Numbers:
    """For every document its own number, as often as it has tokens: what is packed in its place."""

    def __init__(self, lengths: Int64[np.ndarray, " documents"]):
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"document": np.full(self._lengths[index], index, np.int32)}


def make_dataset(
    documents: Documents,
    *,
    length: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    rows: Collection[int] | None = None,
    prefetch: int = 2,
) -> "grain.IterDataset[dict[str, np.ndarray]]":
    """Batches of packed rows, all of [batch_size, length]: ``tokens`` (int32), ``segment_ids`` (int32: 1, 2, … for the
    documents of a row, 0 where it is padded), ``positions`` (int32, from 0 in each document), ``loss_mask`` (bool).

    Documents are shuffled anew every epoch by ``seed``; with ``epochs`` None there is no end. Rows at the turn of
    epochs hold documents of both. After the last epoch the last batch is filled with empty rows. Of each batch,
    ``tokens`` and ``loss_mask`` are read for ``rows`` alone (default: all), and 0 elsewhere. ``prefetch`` batches are
    made ahead by a thread. The iterator's state (``get_state``, ``set_state``) is JSON.

    Raises UserError for documents longer than a row, data without any target, numbers that make no sense, and where
    Grain is not installed.
    """
    _check(documents, length, batch_size, seed, epochs)
    grain = _import_grain()
    source = grain.MapDataset.source(_Numbers(documents.lengths()))
    if shuffle:
        source = source.seed(seed).shuffle()
    packed = grain.experimental.FirstFitPackIterDataset(
        # Nothing is read here that would be worth a thread.
        source.repeat(epochs).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"document": length},
        num_packing_bins=_ROWS_PACKED,
        shuffle_bins=shuffle,
        seed=seed,
    )
    read = _reader(documents, batch_size, range(batch_size) if rows is None else rows)
    batches = packed.batch(batch_size, drop_remainder=False).map(read)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)


def _reader(
    documents: Documents, batch_size: int, rows: Collection[int]
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What puts the documents of some rows into a packed batch; rows that the last batch lacks are empty."""
    pool = ThreadPoolExecutor(_READ_THREADS, "documents")
    needed = np.isin(np.arange(batch_size), list(rows))

    def read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = batch_size - len(batch["document"])
        numbers, segments, positions = (
            np.pad(batch[name], ((0, missing), (0, 0)))
            for name in ("document", "document_segment_ids", "document_positions")
        )
        tokens, loss_mask = np.zeros(numbers.shape, np.int32), np.zeros(numbers.shape, bool)
        first = np.nonzero((segments > 0) & (positions == 0) & needed[:, None])
        for row, column, document in zip(*first, pool.map(documents.__getitem__, numbers[first].tolist()), strict=True):
            inside = slice(column, column + len(document.tokens))
            tokens[row, inside], loss_mask[row, inside] = document.tokens, document.loss_mask
        return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": loss_mask}

    return read


def _check(documents: Documents, length: int, batch_size: int, seed: int, epochs: int | None) -> None:
    if length < 2 or batch_size < 1:
        raise UserError(f"batches of {batch_size} rows of {length} tokens hold nothing to predict")
    if not 0 <= seed < 2**32:
        raise UserError(f"the data seed {seed} is outside 0 … 2**32 - 1")
    if epochs is not None and epochs < 1:
        raise UserError(f"{epochs} epochs leave nothing to train on; give at least 1")
    longest = int(documents.lengths().max())
    if longest > length:
        raise UserError(
            f"{documents.path}: a document of {longest} tokens does not fit a row of {length}; prepare the data with "
            f"a maximal length of {length}, or train with a larger one"
        )
    if not documents.metadata["counts"]["target_tokens"]:
        raise UserError(f"{documents.path}: no token is a target, so there is nothing to learn; look at the loss mask")


def _import_grain() -> Any:  # Grain's own types leave out its experimental parts
    try:
        import grain
        import grain.experimental
    except ModuleNotFoundError as error:
        if error.name != "grain":
            raise
        raise UserError("training data needs grain: pip install 'idlm-jax[train]'") from None
    return grain
