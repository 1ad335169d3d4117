"""Batches hold every document whole, once an epoch, whoever reads it, and go on where their saved state says."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.data import tokens as tokens_module
from idlm_jax.data.pipeline import JoinedDocuments, held_out_split, make_dataset
from idlm_jax.data.tokens import Document, TokenStore, TokenStoreWriter
from idlm_jax.errors import UserError

Batch = dict[str, np.ndarray]


class InMemory:
    """Documents that say their number in every token (from 1, so that padding is no document)."""

    path = Path("in-memory")

    def __init__(self, lengths: list[int]):
        self._lengths = np.array(lengths, np.int64)
        self.metadata: dict[str, Any] = {"counts": {"target_tokens": int(self._lengths.sum())}}

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Document:
        n = self._lengths[index]
        # Any pattern that differs from document to document and has no period.
        return Document(np.full(n, index + 1, np.int32), np.random.default_rng(index).random(n) < 0.5)

    def lengths(self) -> np.ndarray:
        return self._lengths


def batches(documents: Any, **options: Any) -> Iterator[Batch]:
    defaults: dict[str, Any] = {"length": 8, "batch_size": 2, "seed": 0, "epochs": 1}
    iterator = iter(make_dataset(documents, **{**defaults, **options}))
    yield from iterator
    iterator.close()


def unpack(batch: Batch) -> Iterator[Document]:
    """The documents of a batch; fails unless its four arrays fit together."""
    tokens, segments, positions, masks = (batch[k] for k in ("tokens", "segment_ids", "positions", "loss_mask"))
    assert [a.dtype for a in (tokens, segments, positions, masks)] == [np.int32, np.int32, np.int32, np.bool_]
    for row in range(len(tokens)):
        count = segments[row].max()
        used = (segments[row] > 0).sum()
        # Documents stand one after the other from the left, numbered from 1, and nothing is behind them.
        assert (np.diff(segments[row, :used]) >= 0).all() and set(segments[row, :used]) == set(range(1, count + 1))
        for array in (tokens, segments, positions, masks):
            assert not array[row, used:].any()
        for segment in range(1, count + 1):
            inside = segments[row] == segment
            np.testing.assert_array_equal(positions[row, inside], np.arange(inside.sum()))
            yield Document(tokens[row, inside], masks[row, inside])


def numbers(documents: InMemory, found: Iterator[Document]) -> list[int]:
    """Which documents these are; fails for one that is not whole."""
    result = []
    for document in found:
        index = int(document.tokens[0]) - 1
        expected = documents[index]
        np.testing.assert_array_equal(document.tokens, expected.tokens)
        np.testing.assert_array_equal(document.loss_mask, expected.loss_mask)
        result.append(index)
    return result


def rows_of(documents: InMemory, **options: Any) -> list[int]:
    """The order of documents that fill a row each."""
    return [i for batch in batches(documents, **options) for i in numbers(documents, unpack(batch))]


lengths = st.lists(st.integers(1, 8), min_size=3, max_size=30)


@settings(deadline=None, max_examples=40)
@given(
    lengths=lengths,
    batch_size=st.integers(1, 4),
    parts=st.integers(1, 3),
    epochs=st.integers(1, 2),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_document_comes_whole_once_an_epoch_whoever_reads_which_rows(
    lengths: list[int], batch_size: int, parts: int, epochs: int, shuffle: bool, seed: int
) -> None:
    documents = InMemory(lengths)
    options = {"batch_size": batch_size, "epochs": epochs, "shuffle": shuffle, "seed": seed}
    whole = list(batches(documents, **options))
    assert {array.shape for batch in whole for array in batch.values()} == {(batch_size, 8)}
    found = [number for batch in whole for number in numbers(documents, unpack(batch))]
    assert Counter(found) == Counter(dict.fromkeys(range(len(lengths)), epochs))
    for part in range(parts):
        rows = range(part, batch_size, parts)
        others = np.delete(np.arange(batch_size), rows)
        for ours, all_rows in zip(batches(documents, rows=rows, **options), whole, strict=True):
            for name in ("tokens", "loss_mask"):
                np.testing.assert_array_equal(ours[name][rows], all_rows[name][rows])
                assert not ours[name][others].any()
            for name in ("segment_ids", "positions"):
                np.testing.assert_array_equal(ours[name], all_rows[name])


def test_only_documents_of_rows_that_are_needed_are_read() -> None:
    documents, read = InMemory([8] * 40), []
    documents.__class__ = type(
        "Counting", (InMemory,), {"__getitem__": lambda self, i: read.append(i) or InMemory.__getitem__(self, i)}
    )
    assert len(list(batches(documents, batch_size=4, rows=[1]))) == 10
    assert len(read) == 10


def test_packing_fills_rows() -> None:
    documents = InMemory([3, 5, 2, 6, 4, 4] * 50)
    rows = [row for batch in batches(documents, batch_size=1) for row in batch["segment_ids"]]
    assert np.mean(np.array(rows) > 0) > 0.9


def test_order_is_that_of_the_seed() -> None:
    documents = InMemory([8] * 40)
    assert rows_of(documents, seed=3) == rows_of(documents, seed=3)
    assert rows_of(documents, seed=3) != rows_of(documents, seed=4)
    assert rows_of(documents, shuffle=False) == list(range(40))


def test_without_epochs_there_is_no_end() -> None:
    documents = InMemory([8] * 3)
    stream = batches(documents, epochs=None)
    taken = [i for _ in range(192) for i in numbers(documents, unpack(next(stream)))]
    assert Counter(taken) == {0: 128, 1: 128, 2: 128}
    stream.close()  # pyrefly: ignore[missing-attribute]


def equal(ours: Batch, expected: Batch) -> bool:
    return all(np.array_equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_saved_state_goes_on_with_the_same_batches(prefetch: int) -> None:
    rng = np.random.default_rng(0)
    dataset = make_dataset(
        InMemory(rng.integers(1, 9, 900).tolist()), length=8, batch_size=16, seed=1, epochs=1, prefetch=prefetch
    )
    iterator = iter(dataset)
    states, expected = [], []
    while True:
        # As it comes back from a file.
        states.append(json.loads(json.dumps(iterator.get_state())))
        try:
            expected.append(next(iterator))
        except StopIteration:
            break
    assert len(expected) > 30
    for at in range(0, len(expected) + 1, 3):
        resumed = iter(dataset)
        resumed.set_state(states[at])
        rest = list(resumed)
        assert len(rest) == len(expected) - at
        assert all(map(equal, rest, expected[at:]))


@pytest.mark.parametrize("held_out", [1, 7, 0.25, 0.01])
def test_a_split_parts_all_documents_the_same_way_each_time(held_out: int | float) -> None:
    documents = InMemory([1 + i % 8 for i in range(50)])
    train, held = held_out_split(documents, held_out, seed=5)
    assert len(held) == (held_out if isinstance(held_out, int) else {0.25: 13, 0.01: 1}[held_out])
    parts = [[int(part[i].tokens[0]) - 1 for i in range(len(part))] for part in (train, held)]
    assert sorted(parts[0] + parts[1]) == list(range(50))
    for part, chosen in zip((train, held), parts, strict=True):
        assert part.lengths().tolist() == [documents.lengths()[i] for i in chosen]
    again = held_out_split(documents, held_out, seed=5)[1]
    assert [int(again[i].tokens[0]) - 1 for i in range(len(again))] == parts[1]
    other = held_out_split(documents, 13, seed=6)[1]
    assert [int(other[i].tokens[0]) - 1 for i in range(13)] != parts[1]


@pytest.mark.parametrize("held_out", [0, 50, 0.0, 1.0, -1, 1.5])
def test_a_split_with_an_empty_part_is_refused(held_out: int | float) -> None:
    with pytest.raises(UserError, match="both parts need some"):
        held_out_split(InMemory([1] * 50), held_out, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 7}, "a document of 8 tokens does not fit a row of 7; prepare the data with a maximal length of 7"),
        ({"length": 1}, "nothing to predict"),
        ({"batch_size": 0}, "nothing to predict"),
        ({"seed": -1}, "data seed -1 is outside"),
        ({"epochs": 0}, "0 epochs"),
    ],
)
def test_what_cannot_be_batched_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        next(batches(InMemory([8, 1, 1]), **options))
    assert "\n" not in str(caught.value)


def test_data_without_a_target_is_refused() -> None:
    documents = InMemory([8, 1, 1])
    documents.metadata = {"counts": {"target_tokens": 0}}
    with pytest.raises(UserError, match="no token is a target"):
        next(batches(documents))


def test_missing_grain_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install 'idlm-jax\[train\]'"):
        next(batches(InMemory([8])))


def write_store(path: Path) -> TokenStore:
    rng = np.random.default_rng(0)
    with TokenStoreWriter(path, vocab_size=50, tokenizer_hash="hash", settings={}) as writer:
        for n in rng.integers(1, 9, 200):
            writer.append(rng.integers(0, 50, n), rng.random(n) < 0.7)
        writer.finish({})
    return TokenStore.open(path)


def test_batches_of_a_store_hold_its_tokens_and_say_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    store = write_store(tmp_path / "store")
    found = [document for batch in batches(store) for document in unpack(batch)]
    expected = [store[i] for i in range(len(store))]
    assert sorted(d.tokens.tolist() for d in found) == sorted(d.tokens.tolist() for d in expected)
    assert sum(d.loss_mask.sum() for d in found) == store.metadata["counts"]["target_tokens"]
    assert (*capfd.readouterr(), list(recwarn)) == ("", "", [])


def test_damage_found_while_reading_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "CHUNK", 64)
    write_store(tmp_path / "store")
    chunk = tmp_path / "store" / "tokens" / "c" / "3"
    content = bytearray(chunk.read_bytes())
    content[20] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        list(batches(TokenStore.open(tmp_path / "store")))


def test_joined_documents_are_those_of_every_store_in_order() -> None:
    parts = [InMemory([2, 3, 4]), InMemory([5]), InMemory([1, 6, 2, 2, 7])]
    joined = JoinedDocuments(parts)
    expected = [document for part in parts for document in (part[i] for i in range(len(part)))]
    assert len(joined) == len(expected)
    assert [joined[i].tokens.tolist() for i in range(len(joined))] == [d.tokens.tolist() for d in expected]
    assert joined.lengths().tolist() == [len(d.tokens) for d in expected]
