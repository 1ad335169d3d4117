"""The Hopper kernel of window attention: interpreted, compiled for an H100 without one, and run on a real one."""

from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.decode_attention import api, gpu, reference
from tests.kernels.aot import compile_for_h100


def inputs(seed, batch, rows, heads, kv_heads, slots, head_dim, prefix, dtype=jnp.bfloat16):
    """Queries, cache, prefix and mask; what no row may see is poisoned.

    Finite garbage lies behind the window and where a window key is hidden from every row, NaN in the tiles after that.
    """
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.normal(size=size).astype(np.float32)
        for size in (
            (batch, rows, heads, head_dim),
            (batch, kv_heads, slots, head_dim),
            (batch, kv_heads, slots, head_dim),
        )
    )
    mask = (rng.random((batch, rows, rows)) < 0.4) & (np.arange(rows) > 0) | np.eye(rows, dtype=bool)
    if rows > 2:  # the second key hidden from all, its own row seeing the first instead
        mask[:, :, 1], mask[:, 1, 0] = False, True
    large = 3e4 if dtype == jnp.float16 else 1e30
    for b, length in enumerate(prefix):
        k[b, :, length + rows :], v[b, :, length + rows :] = large, -large
        if rows > 2:
            k[b, :, length + 1], v[b, :, length + 1] = -large, large
        unread = -(-(length + rows) // gpu.TILE) * gpu.TILE
        k[b, :, unread:] = v[b, :, unread:] = np.nan
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), jnp.asarray(prefix, jnp.int32), jnp.asarray(mask)


def paged(k, v, page, prefix, rows, seed):
    """The cache in shuffled pages, twice as many as needed, and its page table; other pages and entries are poison."""
    batch, heads, slots, head_dim = k.shape
    order = np.random.default_rng(seed).permutation(2 * batch * slots // page)
    table = order[: batch * slots // page].reshape(batch, -1)

    def pages(cache):
        split = np.asarray(cache).reshape(batch, heads, -1, page, head_dim).swapaxes(1, 2)
        stored = np.full((len(order), heads, page, head_dim), np.nan, split.dtype)
        stored[table] = split
        return jnp.asarray(stored)

    needed = -(-(np.asarray(prefix)[:, None] + rows) // page) > np.arange(table.shape[1])
    return pages(k), pages(v), jnp.asarray(np.where(needed, table, 10**6), jnp.int32)


def exact(q, k, v, prefix, mask):
    """The reference in float32; NaN of the poison counts as zero, which it is not allowed to see anyway."""
    q, k, v = (jnp.nan_to_num(array.astype(jnp.float32)) for array in (q, k, v))
    return np.asarray(reference.window_attention(q, k, v, prefix, mask), np.float64)


def assert_no_worse_than_xla(ours, q, k, v, prefix, mask):
    """Root mean square and largest error against float32 within those of the reference in the dtype of the inputs."""
    wanted = exact(q, k, v, prefix, mask)
    xla = reference.window_attention(q, jnp.nan_to_num(k), jnp.nan_to_num(v), prefix, mask)
    assert ours.shape == xla.shape and ours.dtype == xla.dtype
    errors, xla_errors = (np.asarray(out, np.float64) - wanted for out in (ours, xla))
    assert np.sqrt(np.mean(errors**2)) <= 1.2 * np.sqrt(np.mean(xla_errors**2)) + 1e-7
    assert np.abs(errors).max() <= 2 * np.abs(xla_errors).max() + 1e-7


def interpreted(function, *arguments, splits=None, detect_races=False):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        return np.asarray(function(*arguments, splits=splits))


# (batch, rows, query heads, key heads, slots, head_dim, prefix), splits: group sizes 1 to 12, windows of one and of
# several row tiles, empty prefixes and parts, windows that end at, begin at or lie across the edge of a tile.
CASES = [
    ((2, 7, 4, 1, 192, 64, [121, 0]), 3),
    ((1, 1, 3, 3, 64, 64, [63]), 1),
    ((2, 3, 3, 1, 128, 128, [125, 60]), 1),
    ((1, 16, 8, 2, 128, 128, [64]), 1),
    ((1, 9, 12, 1, 96, 64, [70]), 1),
    ((1, 40, 2, 1, 136, 64, [90]), 2),
    ((1, 64, 1, 1, 128, 64, [30]), 1),
    ((1, 5, 7, 1, 32, 128, [20]), 1),
]


@pytest.mark.parametrize(("sizes", "splits"), CASES)
def test_kernel_is_as_right_as_the_reference_and_blind_to_what_it_may_not_see(sizes, splits):
    arguments = inputs(0, *sizes)
    ours = interpreted(gpu.window_attention, *arguments, splits=splits, detect_races=True)
    assert_no_worse_than_xla(ours, *arguments)


@pytest.mark.parametrize("in_pages", [False, True])
def test_rows_that_fill_up_a_tile_of_packed_queries_may_hold_anything(in_pages):
    q, k, v, prefix, mask = inputs(14, 2, 7, 6, 2, 128, 64, [70, 3])
    caches = paged(k, v, 64, prefix, 7, seed=15) if in_pages else (k, v, None)
    pack = gpu.packing(q, caches[0], in_pages)
    used = pack.packed(jnp.ones_like(q)) == 1
    assert not used.all()
    packed = jnp.where(used, pack.packed(q), jnp.nan)
    ours = interpreted(partial(gpu.packed_window_attention, pack=pack), packed, *caches, prefix, mask, splits=2)
    np.testing.assert_array_equal(ours, interpreted(gpu.window_attention, q, k, v, prefix, mask, splits=2))


def test_half_precision():
    arguments = inputs(1, 1, 4, 4, 2, 128, 64, [77], jnp.float16)
    assert_no_worse_than_xla(interpreted(gpu.window_attention, *arguments, splits=2), *arguments)


@pytest.mark.parametrize(("page", "splits"), [(64, 2), (128, 1)])
def test_a_paged_cache_gives_the_bits_of_a_dense_one(page, splits):
    prefix = [190, 57]
    q, k, v, lengths, mask = inputs(2, 2, 7, 4, 2, 256, 64, prefix)
    dense = interpreted(gpu.window_attention, q, k, v, lengths, mask, splits=splits)
    pages = paged(k, v, page, prefix, 7, seed=3)
    ours = interpreted(gpu.paged_window_attention, q, *pages, lengths, mask, splits=splits)
    np.testing.assert_array_equal(ours, dense)


def test_pages_of_the_reference_hold_the_dense_cache():
    prefix = [90, 5]
    q, k, v, lengths, mask = inputs(3, 2, 3, 4, 2, 128, 64, prefix)
    # What others have left in pages may be NaN, also in those of a request.
    ours = reference.paged_window_attention(q, *paged(k, v, 32, prefix, 3, seed=4), lengths, mask)
    dense = reference.window_attention(q, jnp.nan_to_num(k), jnp.nan_to_num(v), lengths, mask)
    np.testing.assert_array_equal(ours, dense)


def test_requests_do_not_touch_each_other():
    """Bit for bit, whatever the neighbours hold and however long they are."""
    sizes = (4, 3, 4, 2, 128, 64)
    own = inputs(5, *sizes, [100, 9, 64, 31])
    others = inputs(6, *sizes, [2, 9, 124, 77])
    mixed = tuple(jnp.concatenate([b[:1], a[1:2], b[2:]]) for a, b in zip(own, others, strict=True))
    first, second = (interpreted(gpu.window_attention, *a, splits=2) for a in (own, mixed))
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != second[0]).any()


def test_a_window_that_does_not_fit_leads_nowhere():
    """A request without room for its window waits; what it gets is never used, but it may not harm the others."""
    q, k, v, prefix, mask = inputs(12, 2, 5, 2, 1, 128, 64, [40, 100])
    k, v = jnp.nan_to_num(k), jnp.nan_to_num(v)
    pages = paged(k, v, 64, [123, 123], 5, seed=13)
    fits = interpreted(gpu.paged_window_attention, q, *pages, prefix, mask, splits=1)
    full = interpreted(gpu.paged_window_attention, q, *pages, jnp.array([40, 126]), mask, splits=1)
    np.testing.assert_array_equal(full[0], fits[0])


def test_the_kernel_says_what_it_does_not_take():
    def attend(rows=3, heads=4, slots=64, head_dim=64, dtype=jnp.bfloat16, cache_dtype=None, page=None):
        shape = jax.ShapeDtypeStruct
        cache = shape((2, 2, page or slots, head_dim), cache_dtype or dtype)
        q, prefix = shape((2, rows, heads, head_dim), dtype), shape((2,), jnp.int32)
        table = () if page is None else (shape((2, 2), jnp.int32),)
        function = gpu.window_attention if page is None else gpu.paged_window_attention
        jax.eval_shape(function, q, cache, cache, *table, prefix, shape((2, rows, rows), bool))

    for wrong, message in [
        ({"dtype": jnp.float32}, "queries float32"),
        ({"cache_dtype": jnp.float16}, "cache float16"),
        ({"head_dim": 80}, "head_dim 80"),
        ({"rows": 65}, "65 window rows"),
        ({"heads": 130}, "65 query heads a key head"),
        ({"slots": 100}, "100 slots"),
        ({"page": 32}, "pages of 32 slots"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(**wrong)


@given(st.integers(1, 5000), st.integers(1, 2**18))
def test_parts_fill_the_chip_at_most_once_and_are_worth_merging(blocks, slots):
    splits = gpu.choose_splits(blocks, slots)
    assert splits == 1 or (blocks * splits <= 264 and splits * 2 * gpu.TILE < slots + 2 * gpu.TILE)


def test_splits_of_known_shapes():
    assert gpu.choose_splits(8, 32768) == 32
    assert gpu.choose_splits(32 * 8, 4096) == 1
    assert gpu.choose_splits(8, 64) == 1


# (batch, rows, query heads, key heads, slots, head_dim), page size: the shapes of decoding, split and not.
AOT_CASES = [
    ((1, 7, 32, 8, 32768, 128), None),
    ((64, 7, 32, 8, 4096, 128), None),
    ((1, 16, 32, 8, 1024, 128), 64),
    ((32, 16, 32, 8, 4096, 128), 128),
    ((1, 7, 9, 3, 256, 64), None),
    ((64, 64, 9, 3, 1024, 64), None),
    ((17, 25, 32, 8, 1024, 128), None),
]


@pytest.mark.aot
@pytest.mark.parametrize(("sizes", "page"), AOT_CASES)
def test_kernel_compiles_for_an_h100_without_spills_and_two_blocks_fit_on_a_multiprocessor(sizes, page):
    batch, rows, heads, kv_heads, slots, head_dim = sizes
    shape = jax.ShapeDtypeStruct
    q, window = (
        shape((batch, rows, heads, head_dim), jnp.bfloat16),
        (shape((batch,), jnp.int32), shape((batch, rows, rows), bool)),
    )
    if page is None:
        function, cache, table = gpu.window_attention, shape((batch, kv_heads, slots, head_dim), jnp.bfloat16), ()
    else:
        cache = shape((batch * slots // page, kv_heads, page, head_dim), jnp.bfloat16)
        function, table = gpu.paged_window_attention, (shape((batch, slots // page), jnp.int32),)
    kernels = compile_for_h100(function, q, cache, cache, *table, *window)
    assert len(kernels) == (1 if batch > 16 else 2), "attention, and the merge of its parts"
    for kernel in kernels:
        assert kernel.spilled_bytes == 0
        assert 2 * 128 * kernel.registers <= 65536
        assert 2 * (kernel.shared_bytes + 1024) <= 228 * 1024


@pytest.mark.aot
def test_layers_of_one_shape_share_one_kernel():
    shape = jax.ShapeDtypeStruct
    cache = shape((2, 8, 256, 128), jnp.bfloat16)

    def layers(q, k, v, prefix, mask):
        for _ in range(4):
            q = gpu.window_attention(q, k, v, prefix, mask, splits=1)
        return q

    arguments = (shape((2, 7, 32, 128), jnp.bfloat16), cache, cache, shape((2,), jnp.int32), shape((2, 7, 7), bool))
    assert len(compile_for_h100(layers, *arguments)) == 1


GPU_CASES = [
    ((1, 7, 32, 8, 32768, 128, [32000]), None),
    ((3, 1, 8, 8, 1024, 128, [1000, 0, 511]), None),
    ((5, 16, 9, 3, 512, 64, [496, 0, 1, 64, 63]), None),
    ((40, 7, 32, 8, 1024, 128, [25 * i for i in range(40)]), None),
    ((2, 25, 32, 8, 2048, 128, [2000, 100]), 3),
    ((2, 64, 16, 2, 512, 64, [448, 5]), 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "splits"), GPU_CASES)
def test_on_the_chip_kernel_is_right_deterministic_and_the_same_for_pages(sizes, splits):
    arguments = inputs(8, *sizes)
    attend = jax.jit(partial(gpu.window_attention, splits=splits))
    ours = attend(*arguments)
    assert_no_worse_than_xla(ours, *arguments)
    for _ in range(3):
        np.testing.assert_array_equal(attend(*arguments), ours)
    q, k, v, prefix, mask = arguments
    for page in (64, 128):
        pages = paged(k, v, page, sizes[-1], sizes[1], seed=9)
        np.testing.assert_array_equal(gpu.paged_window_attention(q, *pages, prefix, mask, splits=splits), ours)


@pytest.mark.gpu
def test_on_the_chip_requests_do_not_touch_each_other():
    sizes = (16, 7, 32, 8, 1024, 128)
    one = inputs(10, *sizes, [60 * i for i in range(16)])
    other = inputs(11, *sizes, [900 - 50 * i for i in range(16)])
    mixed = tuple(jnp.concatenate([b[:5], a[5:6], b[6:]]) for a, b in zip(one, other, strict=True))
    np.testing.assert_array_equal(api.window_attention(*mixed)[5], api.window_attention(*one)[5])
