"""The reference of window attention, itself against a loop of softmax sums in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decode_attention.reference import window_attention

# (batch, rows, query heads, key heads, slots, head_dim): GQA, MQA and plain heads, one row, a full cache.
SHAPES = [(2, 3, 4, 2, 16, 4), (1, 5, 3, 1, 12, 8), (3, 1, 2, 2, 8, 4), (2, 8, 4, 4, 8, 2), (1, 9, 6, 3, 32, 16)]
_attend = jax.jit(window_attention)


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, prefix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One softmax a request, row and head, over an explicit list of slots."""
    batch, rows, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    for b, row, head in np.ndindex(batch, rows, heads):
        slots = [*range(prefix[b]), *(prefix[b] + key for key in range(rows) if mask[b, row, key])]
        keys, values = (array[b, head // group, slots].astype(np.float64) for array in (k, v))
        scores = keys @ q[b, row, head].astype(np.float64) / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[b, row, head] = weights @ values / weights.sum()
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """(q, k, v, prefix, mask) with prefix lengths from none to a full cache and rows that see themselves."""
    batch, rows, heads, kv_heads, slots, dim = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    prefix = np.array(draw(st.lists(st.integers(0, slots - rows), min_size=batch, max_size=batch)), np.int32)
    mask = rng.random((batch, rows, rows)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask |= np.eye(rows, dtype=bool)
    q, k, v = (
        rng.normal(size=size).astype(np.float32) * 2
        for size in ((batch, rows, heads, dim), (batch, kv_heads, slots, dim), (batch, kv_heads, slots, dim))
    )
    return q, k, v, prefix, mask


@given(cases())
@settings(deadline=None, max_examples=100)
def test_reference_equals_a_softmax_over_the_visible_slots(case: tuple) -> None:
    np.testing.assert_allclose(_attend(*case), naive(*case), atol=2e-5)


@given(cases(), st.sampled_from([1e4, -3e4, 1e30]))
@settings(deadline=None, max_examples=60)
def test_what_lies_in_unseen_slots_never_matters(case: tuple, garbage: float) -> None:
    """Stale slots beyond the window, and window rows that a row may not see, bit for bit."""
    q, k, v, prefix, mask = case
    rows = q.shape[1]
    clean = np.asarray(_attend(q, k, v, prefix, mask))
    for b, length in enumerate(prefix):
        k[b, :, length + rows :] = v[b, :, length + rows :] = garbage
        hidden_from_all = np.flatnonzero(~mask[b].any(axis=0))
        k[b, :, length + hidden_from_all] = garbage
    np.testing.assert_array_equal(_attend(q, k, v, prefix, mask), clean)


@given(cases())
@settings(deadline=None, max_examples=40)
def test_a_row_is_blind_to_window_keys_outside_its_mask(case: tuple) -> None:
    q, k, v, prefix, mask = case
    clean = np.asarray(_attend(q, k, v, prefix, mask))
    key = q.shape[1] - 1
    for b, length in enumerate(prefix):
        k[b, :, length + key] += 5
        v[b, :, length + key] -= 7
    moved = np.asarray(_attend(q, k, v, prefix, mask))
    blind = ~mask[:, :, key]
    np.testing.assert_array_equal(moved[blind], clean[blind])
    assert (np.abs(moved - clean).max(axis=(2, 3))[~blind] > 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_output_has_the_dtype_of_the_queries_and_is_right_to_its_precision(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=size), dtype) for size in ((2, 3, 4, 8), (2, 2, 16, 8), (2, 2, 16, 8)))
    prefix, mask = np.array([13, 2], np.int32), np.tril(np.ones((2, 3, 3), bool))
    ours = _attend(q, k, v, prefix, mask)
    assert ours.dtype == dtype
    expected = naive(*(np.asarray(array, np.float32) for array in (q, k, v)), prefix, mask)
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, atol=2e-2 if dtype == jnp.bfloat16 else 1e-5)
