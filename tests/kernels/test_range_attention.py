"""Range attention against sums written out in numpy; on a GPU, what runs there against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.range_attention import reference
from pallas_kernels.range_attention.api import range_attention


def naive(q, k, v, start, end, group=None, size=1):
    """Row by row, head by head, float64."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    batch, rows, heads, head_dim = q.shape
    out = np.zeros_like(q)
    for b, r, h in np.ndindex(batch, rows, heads):
        kv = h // (heads // k.shape[2])
        keys, values = k[b, start[b, r] : end[b, r], kv], v[b, start[b, r] : end[b, r], kv]
        if group is not None:
            own = slice(r - r % size, r + 1)
            keys = np.concatenate([keys, np.asarray(group[0], np.float64)[b, own, kv]])
            values = np.concatenate([values, np.asarray(group[1], np.float64)[b, own, kv]])
        scores = keys @ q[b, r, h] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[b, r, h] = weights @ values / weights.sum()
    return out


def inputs(seed, batch, rows, length, heads, kv_heads, head_dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 7)
    q = jax.random.normal(keys[0], (batch, rows, heads, head_dim), dtype)
    k, v = (jax.random.normal(key, (batch, length, kv_heads, head_dim), dtype) for key in keys[1:3])
    group = tuple(jax.random.normal(key, (batch, rows, kv_heads, head_dim), dtype) for key in keys[3:5])
    start = jax.random.randint(keys[5], (batch, rows), 0, length)
    end = start + jax.random.randint(keys[6], (batch, rows), 0, length)
    return q, k, v, start, jnp.minimum(end, length), group


@pytest.mark.parametrize(("size", "heads"), [(1, (2, 1)), (2, (4, 2)), (3, (3, 3)), (7, (4, 2))])
def test_rows_see_their_interval_and_their_group_so_far(size, heads):
    attend = jax.jit(reference.range_attention, static_argnames="group_size")
    for seed in range(5):
        q, k, v, start, end, group = inputs(seed, 2, 3 * size, 9, *heads, 4)
        ours = attend(q, k, v, start, end, group, group_size=size)
        np.testing.assert_allclose(ours, naive(q, k, v, start, end, group, size), atol=2e-6)


def test_without_groups_rows_see_their_interval_alone():
    q, k, v, start, _, _ = inputs(1, 2, 6, 9, 4, 2, 8)
    end = jnp.minimum(start + 3, 9)
    ours = range_attention(q, k, v, start, end, implementation="xla")
    np.testing.assert_allclose(ours, naive(q, k, v, start, end), atol=2e-6)


def test_keys_outside_every_interval_get_no_gradient():
    q, k, v, _, _, _ = inputs(2, 1, 4, 9, 2, 1, 4)
    start, end = jnp.full((1, 4), 3), jnp.full((1, 4), 6)

    def loss(k, v):
        return jnp.sum(jnp.square(range_attention(q, k, v, start, end, implementation="xla")))

    for gradient in jax.grad(loss, (0, 1))(k, v):
        assert not np.asarray(gradient)[:, [0, 1, 2, 6, 7, 8]].any()
        assert np.asarray(gradient)[:, 3:6].all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("size", [None, 1, 3, 7])
@pytest.mark.parametrize("implementation", ["cudnn", "pallas"])
def test_kernels_of_a_gpu_equal_the_reference(implementation, size, head_dim):
    if implementation == "pallas" and dispatch.device() != "gpu 9.0":
        pytest.skip("needs a Hopper GPU")
    rows = 96 if size is None else 32 * size
    q, k, v, start, end, group = inputs(4, 2, rows, 128, 8, 2, head_dim, jnp.bfloat16)
    extra = (None, 1) if size is None else (group, size)
    end = jnp.maximum(end, start + 1) if size is None else end

    def loss(implementation, dtype):
        def run(q, k, v, group):
            extra = (None, 1) if size is None else (group, size)
            out = range_attention(q, k, v, start, end, *extra, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        arguments = jax.tree.map(lambda array: array.astype(dtype), (q, k, v, extra[0]))
        return jax.jit(jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True))(*arguments)

    (_, out), gradients = loss(implementation, jnp.bfloat16)
    (_, exact), exact_gradients = loss("xla", jnp.float32)
    for ours, wanted in zip(jax.tree.leaves((out, gradients)), jax.tree.leaves((exact, exact_gradients)), strict=True):
        ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(ours - wanted) <= 1.5e-2 * np.linalg.norm(wanted)
