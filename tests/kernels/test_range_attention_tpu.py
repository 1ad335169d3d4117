"""The TPU kernels of range attention, interpreted on the CPU, against the reference; and compiled for real chips."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.range_attention import reference, tpu
from tests.kernels.tpu import CHIPS, chip, interpreted, needs_libtpu

# The smallest tiles, so that small inputs have several.
SMALL = tpu.Tiles(packed_rows=256, keys=128)


def arrays(seed, batch, rows, length, heads, kv_heads, grouped, head_dim=64, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def normal(*sizes):
        return jnp.asarray(rng.normal(size=sizes), dtype)

    q = normal(batch, rows, heads, head_dim)
    k, v = (normal(batch, length, kv_heads, head_dim) for _ in "kv")
    return q, k, v, tuple(normal(batch, rows, kv_heads, head_dim) for _ in "kv") if grouped else None


def drawn_groups(seed, batch, groups, size, length):
    """Intervals of groups drawn at random in packed documents, in the order of the text; the last ones are absent."""
    rng = np.random.default_rng(seed)
    start, end = np.zeros((2, batch, groups), np.int32)
    for b in range(batch):
        document = np.sort(rng.choice(length, 6, replace=False))
        end[b, :-2] = np.sort(rng.integers(0, length + 1, groups - 2))
        below = np.searchsorted(document, end[b], side="left") - 1
        start[b] = np.where(below >= 0, document[below], 0)
        start[b, -2:] = end[b, -2:] = 0
    return np.repeat(start, size, axis=1), np.repeat(end, size, axis=1)


def packed_documents(lengths):
    """Causal intervals inside documents of these lengths."""
    ends = np.cumsum(lengths)
    return np.repeat(ends - lengths, lengths)[None], np.arange(1, ends[-1] + 1)[None]


def value_and_gradients(attend, q, k, v, group, start, end, size):
    """(output, gradients of q, k, v and the group's keys and values) of an attention under a random cotangent."""
    cotangent = np.random.default_rng(99).normal(size=q.shape).astype(np.float32)

    def loss(q, k, v, group):
        out = attend(q, k, v, start, end, group, size)
        return jnp.vdot(out.astype(jnp.float32), cotangent), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, group)
    return out, gradients


def assert_equal_to_reference(q, k, v, group, start, end, size, capfd):
    start, end = jnp.asarray(start), jnp.asarray(end)
    ours = interpreted(
        partial(value_and_gradients, partial(tpu.range_attention, tiles=SMALL), start=start, end=end, size=size),
        q, k, v, group,
    )  # fmt: skip
    assert "RACE" not in capfd.readouterr().out
    wanted = jax.jit(partial(value_and_gradients, reference.range_attention, size=size))(
        q, k, v, group, start=start, end=end
    )
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "groups", "heads", "length"), [(1, 130, (2, 2), 300), (3, 90, (4, 2), 256), (7, 40, (3, 1), 129)]
)
def test_groups_anywhere_in_packed_documents_equal_the_reference(size, groups, heads, length, capfd):
    q, k, v, group = arrays(size, 2, groups * size, length, *heads, grouped=True)
    assert_equal_to_reference(q, k, v, group, *drawn_groups(size, 2, groups, size, length), size, capfd)


def test_packed_documents_equal_the_reference(capfd):
    # One token; up to a tile's edge, and one short of it; a whole tile and more.
    start, end = packed_documents([1, 127, 1, 1, 125, 140])
    q, k, v, _ = arrays(5, 1, end.size, end.size, 4, 1, grouped=False)
    assert_equal_to_reference(q, k, v, None, start, end, 1, capfd)


def test_intervals_that_end_at_or_beside_an_edge_of_a_tile_equal_the_reference():
    # One for all rows of a tile: nothing but it decides which tiles of keys need a mask.
    edges = np.array([[0, 127], [0, 128], [0, 129], [1, 128], [127, 256], [128, 256], [129, 257], [127, 128]])
    start, end = (jnp.asarray(np.repeat(edge, 128)[None]) for edge in edges.T)
    q, k, v, _ = arrays(9, 1, end.size, 300, 1, 1, grouped=False)
    ours = interpreted(partial(tpu.range_attention, tiles=tpu.Tiles(packed_rows=128, keys=128)), q, k, v, start, end)
    np.testing.assert_allclose(ours, reference.range_attention(q, k, v, start, end), atol=1e-6, rtol=1e-5)


def test_rows_that_see_no_key_are_zero_and_give_no_gradient():
    q, k, v, _ = arrays(6, 2, 256, 256, 1, 1, grouped=False)
    start = np.tile(np.arange(256), (2, 1))
    end = start + (start % 2)  # every other row
    end[1, 128:] = 0  # and a whole tile, and intervals that end before they start
    tiles = tpu.Tiles(packed_rows=128, keys=128)
    attend = partial(tpu.range_attention, tiles=tiles)
    out, (d_q, d_k, d_v, _) = interpreted(
        partial(value_and_gradients, attend, start=jnp.asarray(start), end=jnp.asarray(end), size=1), q, k, v, None
    )
    sees = end > start
    np.testing.assert_allclose(np.asarray(out)[sees], np.asarray(v)[sees], rtol=1e-6)
    for array in (out, d_q, d_k, d_v):
        assert not np.asarray(array)[~sees].any()
    assert np.isfinite(np.asarray(d_v)).all() and np.asarray(d_v)[sees].all()


def test_unseen_keys_and_other_batch_rows_do_not_change_a_bit():
    q, k, v, group = arrays(7, 2, 150, 384, 2, 1, grouped=True)
    start, end = drawn_groups(7, 2, 50, 3, 384)
    # Nobody sees the first ten keys, the last tile, and half of the tile before it.
    start, end = np.maximum(start, 10), np.clip(end, 10, 200)
    attend = partial(tpu.range_attention, start_BR=jnp.asarray(start), end_BR=jnp.asarray(end), group_size=3)

    def run(q, k, v, group):
        return attend(q, k, v, group=group, tiles=SMALL)

    clean = interpreted(run, q, k, v, group)
    k, v = (array.at[:, :10].set(1e30).at[:, 200:].set(-1e30) for array in (k, v))
    q, k, v, group = jax.tree.map(lambda array: array.at[1].multiply(3), (q, k, v, group))
    moved = interpreted(run, q, k, v, group)
    np.testing.assert_array_equal(moved[0], clean[0])
    assert np.isfinite(np.asarray(moved)).all() and (np.asarray(moved[1]) != np.asarray(clean[1])).any()


def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16():
    start, end = (jnp.asarray(array) for array in drawn_groups(8, 1, 40, 3, 200))
    exact = arrays(8, 1, 120, 200, 4, 2, grouped=True, head_dim=128)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), exact)
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), rounded)
    run = partial(value_and_gradients, start=start, end=end, size=3)
    wanted = jax.jit(partial(run, reference.range_attention))(*exact)
    plain = jax.jit(partial(run, reference.range_attention))(*rounded)
    ours = interpreted(partial(run, partial(tpu.range_attention, tiles=SMALL)), *rounded)
    for mine, other, true in zip(*map(jax.tree.leaves, (ours, plain, wanted)), strict=True):
        assert mine.dtype == jnp.bfloat16
        error, allowed = (np.linalg.norm(np.asarray(array, np.float64) - true) for array in (mine, other))
        assert error <= 1.05 * allowed


def programs(batch, rows, length, heads, kv_heads, head_dim, size, dtype, sharding=None):
    """(name, kernels in it, traced program) of the forward pass, of training, and of training with frozen keys."""

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    q, interval = shape(batch, rows, heads, head_dim), shape(batch, rows, dtype=jnp.int32)
    kv, own = shape(batch, length, kv_heads, head_dim), shape(batch, rows, kv_heads, head_dim)

    def forward(q, k, v, group, start, end):
        return tpu.range_attention(q, k, v, start, end, group, size or 1)

    def loss(*arguments):
        return jnp.sum(jnp.sin(forward(*arguments)))

    arguments = (q, kv, kv, (own, own) if size else None, interval, interval)
    functions = {
        "forward": (1, forward),
        "train": (3, jax.grad(loss, (0, 1, 2, 3))),
        "frozen": (2, jax.grad(loss, (0, 3))),
    }
    return [(name, count, jax.jit(function).trace(*arguments)) for name, (count, function) in functions.items()]


def test_the_kernels_can_be_lowered_for_a_tpu():
    for _, _, program in programs(1, 384, 256, 4, 2, 128, 3, jnp.bfloat16):
        program.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, "head_dim 64 or 128, not 96"),
        ({"dtype": jnp.float16}, "bfloat16 or float32, not float16"),
        ({"rows": 4}, "4 rows are not whole groups of 3 rows"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change, message):
    q, k, v, group = arrays(**{"seed": 0, "batch": 1, "rows": 6, "length": 8, "heads": 2, "kv_heads": 1, **change},
                            grouped=True)  # fmt: skip
    interval = jnp.zeros(q.shape[:2], jnp.int32)
    with pytest.raises(ValueError, match=message):
        tpu.range_attention(q, k, v, interval, interval, group, 3)


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4096, 4096, 32, 8, 128, None, jnp.bfloat16),
        (1, 4095, 4096, 32, 8, 128, 3, jnp.bfloat16),
        (2, 2100, 2048, 9, 3, 64, 7, jnp.bfloat16),
        (1, 1024, 1000, 4, 4, 64, 2, jnp.float32),
    ],
)
def test_compiles_for_the_chip(name, shape):
    with chip(name) as sharding:
        for what, kernels, program in programs(*shape, sharding=sharding):
            compiled = program.lower().compile()
            # With frozen keys, the kernel of their gradients is gone.
            assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels, what
            # Nothing but outputs and what the backward pass keeps: no scores, no keys repeated for every head.
            batch, rows, _, heads, _, head_dim, _, dtype = shape
            rows_of_heads = batch * rows * heads * max(head_dim, 128) * jnp.dtype(dtype).itemsize
            assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows_of_heads, what
