"""Batches for training: a Grain pipeline that shuffles documents, packs them into rows, and can be checkpointed.

A document is never split, and never crosses a row; `segment_ids` and `positions` tell the documents of a row apart.
"""

import math
from collections.abc import Sequence
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
# Documents read ahead, and threads that read them.
_READ_AHEAD, _READ_THREADS = 64, 4


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


def make_dataset(
    documents: Documents,
    *,
    length: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> "grain.IterDataset[dict[str, np.ndarray]]":
    """Batches of packed rows, all of [batch_size, length]: ``tokens`` (int32), ``segment_ids`` (int32: 1, 2, … for the
    documents of a row, 0 where it is padded), ``positions`` (int32, from 0 in each document), ``loss_mask`` (bool).

    Documents are shuffled anew every epoch by ``seed``, and each process packs its share of them into batches of its
    own; with ``epochs`` None there is no end. Rows at the turn of epochs hold documents of both. After the last epoch
    the last batch is filled with empty rows; processes may then differ in the number of batches. ``prefetch`` batches
    are made ahead by a thread. State of the iterator: ``get_state``, ``set_state``, or Orbax.

    Raises UserError for documents longer than a row, fewer documents than processes, data without any target, numbers
    that make no sense, and where Grain is not installed.
    """
    _check(documents, length, batch_size, seed, epochs, process_count)
    grain = _import_grain()
    source = grain.MapDataset.source(documents)
    if shuffle:
        source = source.seed(seed).shuffle()
    rows = grain.experimental.FirstFitPackIterDataset(
        source[process_index::process_count]
        .repeat(epochs)
        .map(Document._asdict)
        .to_iter_dataset(grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)),
        length_struct={"tokens": length, "loss_mask": length},
        # No segment ids of its own for the mask.
        meta_features=("loss_mask",),
        num_packing_bins=_ROWS_PACKED,
        shuffle_bins=shuffle,
        seed=seed,
    )
    batches = rows.batch(batch_size, drop_remainder=False).map(lambda batch: _finish(batch, batch_size))
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)


def _finish(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Our names, and empty rows where the last batch lacks some."""
    missing = batch_size - len(batch["tokens"])
    names = {"segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    return {
        name: np.pad(batch[names.get(name, name)], ((0, missing), (0, 0)))
        for name in ("tokens", "segment_ids", "positions", "loss_mask")
    }


def _check(
    documents: Documents, length: int, batch_size: int, seed: int, epochs: int | None, process_count: int
) -> None:
    if length < 2 or batch_size < 1:
        raise UserError(f"batches of {batch_size} rows of {length} tokens hold nothing to predict")
    if not 0 <= seed < 2**32:
        raise UserError(f"the data seed {seed} is outside 0 … 2**32 - 1")
    if epochs is not None and epochs < 1:
        raise UserError(f"{epochs} epochs leave nothing to train on; give at least 1")
    if len(documents) < process_count:
        raise UserError(f"{documents.path}: {len(documents)} documents for {process_count} processes; each needs one")
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
