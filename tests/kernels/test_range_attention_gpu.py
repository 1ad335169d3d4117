"""The Hopper kernels of range attention: interpreted, compiled for an H100 without one, and run on a real one."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import dispatch
from pallas_kernels.range_attention import gpu, gpu_tiles, reference
from tests.kernels.aot import compile_for_h100

# The interpreter runs each GPU thread in a thread of XLA's pool; with as many as two cores it would wait for ever.
os.environ.setdefault("NPROC", "32")


def documents(rng, batch, rows, length, longest):
    """Starts and ends as training has them: ascending, inside documents of 1 … ``longest`` tokens."""
    starts, ends = [], []
    for _ in range(batch):
        cuts = np.cumsum(rng.integers(1, longest + 1, length))
        end = np.sort(rng.integers(0, length, rows))
        before = np.concatenate([[0], cuts])
        starts.append(before[np.searchsorted(cuts, end, side="right")])
        ends.append(end)
    return np.stack(starts), np.stack(ends)


def inputs(seed, sizes, size, intervals, dtype=jnp.bfloat16):
    """q, k, v, start, end, group and a cotangent; what no row sees is huge."""
    batch, rows, length, heads, kv_heads, head_dim = sizes
    rng = np.random.default_rng(seed)
    q, k, v, k_own, v_own, cotangent = (
        rng.normal(size=(batch, count, some, head_dim)).astype(np.float32)
        for count, some in [(rows, heads), *[(length, kv_heads)] * 2, *[(rows, kv_heads)] * 2, (rows, heads)]
    )
    start, end = intervals(rng, batch, rows, length)
    key = np.arange(length)
    seen = ((key >= start[:, :, None]) & (key < end[:, :, None])).any(1)
    k[~seen], v[~seen] = 1e4, -1e4
    to = partial(jnp.asarray, dtype=dtype)
    group = None if size is None else (to(k_own), to(v_own))
    return to(q), to(k), to(v), jnp.asarray(start), jnp.asarray(end), group, to(cotangent)


def attend(function, q, k, v, start, end, group, cotangent, size):
    """Output and gradients of q, k, v and group."""

    def run(q, k, v, group):
        return function(q, k, v, start, end, group, size or 1)

    out, pull = jax.vjp(run, q, k, v, group)
    return jax.tree.leaves((out, pull(cotangent.astype(out.dtype))))


def exact(q, k, v, start, end, group, cotangent, size):
    """The same by the reference in float32, where rows that see nothing are zero and give no gradient."""
    empty = (start >= jnp.minimum(end, k.shape[1])) & (size is None)
    start, end = jnp.where(empty, 0, start), jnp.where(empty, 1, end)
    q, k, v, group, cotangent = jax.tree.map(lambda array: array.astype(jnp.float32), (q, k, v, group, cotangent))
    cotangent = jnp.where(empty[:, :, None, None], 0, cotangent)
    out, *gradients = attend(
        jax.jit(reference.range_attention, static_argnums=6), q, k, v, start, end, group, cotangent, size
    )
    return [jnp.where(empty[:, :, None, None], 0, out), *gradients]


def assert_close(ours, wanted, tolerance=5e-3):
    """Relative to each array, but for what float32 leaves of a gradient that is a difference of equals, hence 0.

    The equals are sums of head_dim products, up to 128 of them and each rounded to 2^-24: 1e-5 of the largest array.
    """
    ours, wanted = ([np.asarray(array, np.float64) for array in arrays] for arrays in (ours, wanted))
    norm, entry = (max(map(size, wanted)) * 1e-5 for size in (np.linalg.norm, largest))
    for mine, right in zip(ours, wanted, strict=True):
        assert mine.shape == right.shape and np.isfinite(mine).all()
        assert np.abs(mine[right == 0]).max(initial=0) <= 1e-5
        assert np.linalg.norm(mine - right) <= tolerance * np.linalg.norm(right) + norm
        assert largest(mine - right) <= 4 * tolerance * largest(right) + entry


def largest(array):
    return np.abs(array).max()


def scattered(rng, batch, rows, length):
    """Any intervals at all: unordered, empty, of one key, of all keys, at the edges of tiles."""
    start = rng.integers(0, length, (batch, rows))
    end = np.minimum(start + rng.integers(0, length, (batch, rows)), length)
    edges = np.asarray([0, 63, 64, 65, 127, 128, 129, length])
    start[:, 1::3], end[:, 1::3] = (np.minimum(rng.choice(edges, start[:, 1::3].shape), length) for _ in range(2))
    start[:, 2::7], end[:, 2::7] = 0, length
    end[:, 4::9] = start[:, 4::9] + 1
    return start, end


def packed(longest):
    return lambda rng, batch, rows, length: documents(rng, batch, rows, length, longest)


def nothing(rng, batch, rows, length):
    return np.full((batch, rows), 5), np.full((batch, rows), 5)


# (batch, rows, keys, query heads, key heads, head_dim), group size, intervals: tiles that are cut off, groups that lie
# across tiles and warpgroups, documents of one token, rows that see nothing, a row that sees only itself.
CASES = {
    "scattered": ((1, 150, 200, 2, 1, 64), None, scattered),
    "groups of 3": ((1, 249, 136, 1, 1, 64), 3, packed(50)),
    "groups of 15": ((2, 75, 40, 1, 1, 128), 15, packed(9)),
    "one row": ((1, 1, 1, 1, 1, 64), 1, nothing),
}


@pytest.fixture
def races(monkeypatch):
    """What the race detector saw in each interpreted kernel."""
    seen, make = [], gpu_callbacks.GPURaceDetectionState

    def record(**arguments):
        seen.append(make(**arguments))
        return seen[-1]

    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", record)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_without_races(case, races):
    sizes, size, intervals = CASES[case]
    arguments = inputs(0, sizes, size, intervals)
    ours = attend(partial(gpu.range_attention, interpret=True), *arguments, size)
    assert_close(ours, exact(*arguments, size))
    assert len(races) == (3 if size is None else 4)
    assert not any(state.races_found for state in races)


def test_rows_of_a_batch_do_not_touch_each_other():
    """Bit for bit, whatever the neighbour holds; and where nothing is visible, nothing comes out."""
    sizes = (2, 16, 16, 1, 1, 64)
    first, second = (inputs(seed, sizes, None, intervals) for seed, intervals in ((1, scattered), (2, nothing)))
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), first, second)
    run = partial(attend, partial(gpu.range_attention, interpret=True))
    for alone, beside in zip(run(*first, None), run(*mixed, None), strict=True):
        np.testing.assert_array_equal(alone[0], beside[0])
        assert np.asarray(alone[1]).any() and not np.asarray(beside[1]).any()


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([scattered, packed(60), nothing]),
)
@settings(max_examples=20, deadline=None)
def test_tables_hold_every_visible_pair_and_skip_the_mask_only_where_all_is_visible(seed, rows, length, intervals):
    start, end = intervals(np.random.default_rng(seed), 1, rows, length)
    start, end = np.minimum(start, length), np.minimum(end, length)
    keys = np.zeros((1, length, 1, 64))
    source = jax.tree.map(np.asarray, gpu_tiles.make_source(keys, keys, jnp.asarray(start), jnp.asarray(end)))
    half, tile = gpu_tiles.HALF, gpu_tiles.TILE
    visible = np.zeros((source.start_BR.shape[1], -(-length // tile) * tile), bool)
    for row in range(rows):
        visible[row, start[0, row] : end[0, row]] = True
    by_tile = visible.reshape(-1, tile, visible.shape[1] // tile, tile)
    for i, (first, count) in enumerate(source.row_tiles.reshape(-1, 2)):
        assert not np.delete(by_tile[i].any((0, 2)), slice(first, first + count)).any()
    by_half = visible.reshape(-1, half, visible.shape[1] // half, half)
    for i, (largest_start, smallest_end) in enumerate(source.row_bounds.reshape(-1, 2)):
        # Whole halves make whole tiles.
        for j in range(by_half.shape[2]):
            if j * half >= largest_start and (j + 1) * half <= smallest_end:
                assert by_half[i, :, j].all()
    for j, (first, count) in enumerate(source.key_tiles.reshape(-1, 2)):
        assert not np.delete(by_half.any((1, 3))[:, 2 * j : 2 * j + 2].any(1), slice(first, first + count)).any()


def test_the_kernels_say_what_they_do_not_take():
    def check(dtype=jnp.bfloat16, head_dim=64, size=1):
        arguments = inputs(3, (1, size, 4, 1, 1, head_dim), size, scattered, dtype)
        gpu.range_attention(*arguments[:6], size)

    for wrong, message in [
        ({"dtype": jnp.float32}, "not float32"),
        ({"head_dim": 80}, "not 80"),
        ({"size": 18}, "up to 17 rows, not 18"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(**wrong)


def abstract(batch, rows, length, heads, kv_heads, head_dim, grouped):
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    keys = [shape((batch, length, kv_heads, head_dim))] * 2
    own = [shape((batch, rows, kv_heads, head_dim))] * (2 if grouped else 0)
    return shape((batch, rows, heads, head_dim)), *keys, *[jax.ShapeDtypeStruct((batch, rows), jnp.int32)] * 2, *own


def loss(size, q, k, v, start, end, *own):
    return jnp.sum(gpu.range_attention(q, k, v, start, end, own or None, size or 1).astype(jnp.float32))


@pytest.mark.aot
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("size", [None, 1, 3, 7])
def test_kernels_compile_for_an_h100_without_spills(size, head_dim):
    rows = 4096 if size is None else -(-4096 // size) * size
    arguments = abstract(2, rows, 4096, 32, 8, head_dim, size is not None)
    of = tuple(i for i in range(len(arguments)) if i not in (3, 4))
    kernels = compile_for_h100(jax.grad(partial(loss, size), of), *arguments)
    assert len(kernels) == (3 if size is None else 4)
    for kernel in kernels:
        assert kernel.spilled_bytes == 0
        assert kernel.registers == 168
        assert kernel.shared_bytes <= 227 * 1024


@pytest.mark.aot
def test_frozen_clean_keys_cost_no_kernel():
    arguments = abstract(1, 3072, 4096, 32, 8, 128, True)
    everything = compile_for_h100(jax.grad(partial(loss, 3), (0, 1, 2, 5, 6)), *arguments)
    gated = compile_for_h100(jax.grad(partial(loss, 3), (0, 5, 6)), *arguments)
    assert (len(everything), len(gated)) == (4, 3)


GPU_CASES = CASES | {
    "all key heads": ((2, 300, 300, 4, 4, 128), None, scattered),
    "one key head": ((1, 260, 520, 8, 1, 64), None, scattered),
    "long": ((1, 3072, 3000, 8, 2, 128), 3, packed(900)),
    "packed": ((2, 2048, 2048, 6, 2, 64), None, scattered),
    "groups of 1": ((1, 1000, 1024, 4, 2, 128), 1, packed(300)),
    "groups of 7": ((2, 1001, 1024, 8, 2, 128), 7, packed(300)),
    "groups of 17": ((1, 2040, 500, 2, 1, 128), 17, packed(300)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", GPU_CASES)
def test_kernels_on_hopper_equal_the_reference_and_repeat_bit_by_bit(case, dtype):
    if dispatch.device() != "gpu 9.0":
        pytest.skip("needs a Hopper GPU")
    sizes, size, intervals = GPU_CASES[case]
    arguments = inputs(5, sizes, size, intervals, dtype)
    run = jax.jit(partial(attend, gpu.range_attention, size=size))
    ours = run(*arguments)
    assert_close(ours, exact(*arguments, size))
    for _ in range(10):
        for first, again in zip(ours, run(*arguments), strict=True):
            np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("kept, forward_passes", [(False, 2), (True, 1)])
def test_its_results_can_be_kept_where_all_else_is_computed_again(kept, forward_passes):
    arguments = inputs(6, (1, 64, 64, 2, 1, 64), None, packed(64), jnp.bfloat16)
    names = (reference.RANGE_ATTENTION,) if kept else ()
    run = jax.checkpoint(
        lambda q, k, v, *rest: jnp.sum(gpu.range_attention(q, k, v, *rest).astype(jnp.float32)),
        policy=jax.checkpoint_policies.save_only_these_names(*names),
    )
    traced = jax.make_jaxpr(jax.value_and_grad(run, (0, 1, 2)))(*arguments[:5])
    assert count_kernels(traced.jaxpr) == forward_passes + 2


def count_kernels(jaxpr):
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == "mpmd_map"
        for parameter in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            found += count_kernels(inner) if hasattr(inner, "eqns") else 0
    return found
