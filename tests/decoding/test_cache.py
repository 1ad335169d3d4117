"""The key/value cache: what rounds leave in it is what a fresh prefill of the same tokens stores."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.decoding import generate
from idlm_jax.decoding.cache import SMALLEST_BUCKET, bucket, cache_bytes, init_cache, write_rows
from idlm_jax.decoding.generate import SamplingParams, advance, emissions, start
from idlm_jax.decoding.step import DecodeState, prefill_chunk
from tests.decoding.helpers import (
    AR,
    MASK,
    MOST,
    drafting_adapter,
    drafting_config,
    drafting_model,
    make_policy,
    random_prompts,
)

BATCH = 8


def committed(state: DecodeState, lengths: np.ndarray) -> list[np.ndarray]:
    """Keys and values of the first ``lengths`` slots of every request: [layer and kind, head, slot, head_dim]."""
    arrays = np.stack([np.asarray(array) for layer in state.cache for array in layer])
    return [arrays[:, b, :, :length] for b, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("stride", "layout", "coupling", "gated"),
    [
        (1, "branch", "gumbel", True),
        (2, "standard", "gumbel", True),
        (3, "branch", "ratio", True),
        (4, "standard", "ratio", True),
        (4, "branch", "gumbel", False),
        (8, "branch", "gumbel", True),
    ],
)
def test_rounds_leave_the_cache_of_a_fresh_prefill(stride: int, layout: str, coupling: str, gated: bool) -> None:
    model, policy = drafting_model(drafting_adapter()), make_policy(stride, layout, coupling, gated)
    prompts = random_prompts(BATCH, seed=3)
    # A sampled half and a greedy half; nobody ends within the rounds run.
    sampling = [SamplingParams(float(i % 2), seed=i, max_tokens=MOST) for i in range(BATCH)]
    state = start(model, prompts, sampling, policy)
    rounds_left = MOST // stride
    for rounds in (1, 1, 2, 3, 7):
        rounds = min(rounds, rounds_left)
        rounds_left -= rounds
        state = advance(model, state, rounds, policy)
        so_far = emissions(state, BATCH)
        lengths = np.array([len(p) + len(e.tokens) - 1 for p, e in zip(prompts, so_far, strict=True)])
        # Everything emitted but the pending token is committed.
        active = np.array([not emission.done for emission in so_far])
        assert (np.asarray(state.length) == lengths)[active].all()
        pending = [emission.tokens[-1] for emission in so_far]
        assert (np.asarray(state.pending) == pending)[active].all()

        full = [[*p, *e.tokens.tolist()] for p, e in zip(prompts, so_far, strict=True)]
        fresh = start(model, full, [SamplingParams(max_tokens=1)] * BATCH, policy)
        for ours, expected in zip(committed(state, lengths), committed(fresh, lengths), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
    if stride > 1:
        outcomes = np.concatenate([emission.history for emission in so_far])
        assert outcomes.max() > 0  # accepted drafts were committed


def test_prefill_in_chunks_equals_prefill_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = drafting_model(), random_prompts(BATCH, seed=4, longest=100)
    sampling = [SamplingParams(max_tokens=20)] * BATCH
    lengths = np.array([len(prompt) - 1 for prompt in prompts])
    whole = committed(start(model, prompts, sampling, AR), lengths)
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 32)
    for ours, expected in zip(committed(start(model, prompts, sampling, AR), lengths), whole, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_padding_on_the_right_has_no_influence_bit_for_bit() -> None:
    model = drafting_model()
    lengths = np.array([1, 7, 20, 31, 32, 5, 12, 19])
    tokens = np.random.default_rng(0).integers(0, MASK, (BATCH, 32))
    padding = np.arange(32) >= lengths[:, None]
    prefill = jax.jit(partial(prefill_chunk, adapter_from=None))
    caches = []
    for filler in (0, 17, MASK):
        empty = init_cache(model.config, BATCH, 32, jnp.float32)
        caches.append(prefill(model, empty, jnp.asarray(np.where(padding, filler, tokens)), 0))
    for layer in range(model.config.num_hidden_layers):
        for kind in range(2):
            first, *others = (np.asarray(cache[layer][kind]) for cache in caches)
            for other in others:
                for b, length in enumerate(lengths):
                    np.testing.assert_array_equal(first[b, :, :length], other[b, :, :length])
                assert (first != other).any()  # the padding did differ


def test_neighbours_do_not_touch_a_requests_slots() -> None:
    """The cache of a request is the same bit for bit whoever decodes beside it."""
    model, policy = drafting_model(drafting_adapter()), make_policy(4, "branch", gated=False)
    sampling = [SamplingParams(max_tokens=MOST)] * BATCH
    first, second = random_prompts(BATCH, seed=6), random_prompts(BATCH, seed=7)
    mixed = [first[0], *second[1:-1], first[-1]]
    runs = []
    for prompts in (first, mixed):
        state = advance(model, start(model, prompts, sampling, policy), 5, policy)
        runs.append(committed(state, np.asarray(state.length)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][-1], runs[1][-1])


@given(st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_bucket_is_the_smallest_power_of_two_that_holds_the_length(length: int, other: int) -> None:
    size = bucket(length)
    assert size.bit_count() == 1
    assert size >= max(length, SMALLEST_BUCKET)
    assert size == SMALLEST_BUCKET or size < 2 * length
    assert (bucket(other) >= size) or other < length


def test_a_cache_has_the_bytes_it_is_said_to_have() -> None:
    cache = init_cache(drafting_config(), 3, 64, jnp.bfloat16)
    assert sum(array.nbytes for layer in cache for array in layer) == cache_bytes(
        drafting_config(), 3, 64, jnp.bfloat16
    )


SLOTS, PAGE, HEADS, DIM = 12, 3, 2, 3
_write = jax.jit(write_rows)


@given(st.sampled_from([1, 4]), st.lists(st.integers(0, SLOTS), min_size=3, max_size=3), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_rows_are_written_after_the_length_and_nothing_else_changes(rows: int, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.normal(size=(3, HEADS, SLOTS, DIM)).astype(np.float32)
    new = rng.normal(size=(3, rows, HEADS, DIM)).astype(np.float32)
    lengths = np.minimum(lengths, SLOTS - rows)
    expected = old.copy()
    for b, length in enumerate(lengths):
        for row in range(rows):
            expected[b, :, length + row] = new[b, row]
    np.testing.assert_array_equal(_write(old, new, lengths), expected)
    # One request alone takes another path to the same slots.
    np.testing.assert_array_equal(_write(old[:1], new[:1], lengths[:1]), expected[:1])
    # And so do requests whose slots lie in pages.
    table = 1 + rng.permutation(3 * SLOTS // PAGE + 2)[: 3 * SLOTS // PAGE].reshape(3, -1)
    pages = rng.normal(size=(3 * SLOTS // PAGE + 3, HEADS, PAGE, DIM)).astype(np.float32)
    expected_pages = pages.copy()
    for whole, of_requests in ((pages, old), (expected_pages, expected)):
        whole[table] = of_requests.reshape(3, HEADS, -1, PAGE, DIM).swapaxes(1, 2)
    np.testing.assert_array_equal(_write(pages, new, lengths, table), expected_pages)
