"""The TPU kernel of window attention, interpreted on the CPU, against the reference; and compiled for real chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import reference, tpu
from tests.kernels.tpu import CHIPS, chip, interpreted, needs_libtpu


def case(seed, window, heads, kv_heads, prefix, slots, head_dim=64, dtype=jnp.float32):
    """(q, k, v, prefix, mask) of one request a prefix, rows that see themselves and random others, finite garbage."""
    rng = np.random.default_rng(seed)
    prefix = np.array(prefix, np.int32)
    q, k, v = (
        rng.normal(size=(len(prefix), *sizes))
        for sizes in ((window, heads, head_dim), (kv_heads, slots, head_dim), (kv_heads, slots, head_dim))
    )
    mask = rng.random((len(prefix), window, window)) < 0.5
    return *(jnp.asarray(array, dtype) for array in (q, k, v)), prefix, mask | np.eye(window, dtype=bool)


def poison(k, v, prefix, window):
    """The cache with NaN where the windows end."""
    beyond = np.arange(k.shape[2]) >= prefix[:, None] + window
    return tuple(jnp.where(beyond[:, None, :, None], jnp.nan, array) for array in (k, v))


def paged(seed, k, v, prefix, window, page):
    """(pages of k, of v, table) of a dense cache: pages in any order, NaN in free ones, no number beyond the end."""
    batch, kv_heads, slots, head_dim = k.shape
    used = -(-slots // page)
    order = np.random.default_rng(seed).permutation(batch * used + 2)
    table = order[: batch * used].reshape(batch, used)
    pools = []
    for array in poison(k, v, prefix, window):
        array = jnp.pad(array, ((0, 0), (0, 0), (0, used * page - slots), (0, 0)), constant_values=jnp.nan)
        pages = array.reshape(batch, kv_heads, used, page, head_dim).swapaxes(1, 2)
        pools.append(jnp.full((len(order), kv_heads, page, head_dim), jnp.nan, array.dtype).at[table].set(pages))
    table = np.where(np.arange(used) * page < prefix[:, None] + window, table, -(10**6))
    return *pools, table


@pytest.mark.parametrize(
    ("window", "heads", "prefix", "slots", "page", "head_dim", "dtype"),
    [
        # No prefix; the window across an edge of tiles and pages; the prefix's end at such an edge; a full cache.
        (7, (4, 2), [0, 509, 512, 1193], 1200, 32, 64, jnp.float32),
        (16, (8, 2), [1, 250, 624], 640, 128, 128, jnp.bfloat16),
        (64, (6, 2), [32, 0], 96, 16, 64, jnp.float32),
        (1, (3, 3), [0, 127, 128], 256, 256, 64, jnp.bfloat16),
    ],
)
def test_dense_and_paged_equal_the_reference(window, heads, prefix, slots, page, head_dim, dtype, capfd):
    q, k, v, prefix, mask = case(window, window, *heads, prefix, slots, head_dim, dtype)
    wanted = reference.window_attention(*(array.astype(jnp.float32) for array in (q, k, v)), prefix, mask)
    dense = interpreted(tpu.window_attention, q, *poison(k, v, prefix, window), prefix, mask)
    *pools, table = paged(window, k, v, prefix, window, page)
    from_pages = interpreted(tpu.paged_window_attention, q, *pools, table, prefix, mask)
    assert "RACE" not in capfd.readouterr().out
    for ours in (dense, from_pages):
        assert ours.dtype == dtype
        tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.asarray(ours, np.float32), wanted, atol=tolerance, rtol=tolerance)


def test_masked_window_keys_and_other_requests_do_not_change_a_bit():
    q, k, v, prefix, mask = case(3, 5, 4, 2, [600, 40], 700)
    mask[0, :, 4] = False
    mask[0, 4, 0] = True
    clean = interpreted(tpu.window_attention, q, k, v, prefix, mask)
    k, v = k.at[0, :, 604].set(1e30), v.at[0, :, 604].set(-1e30)
    q, k, v = (array.at[1].multiply(2) for array in (q, k, v))
    prefix = np.array([600, 690], np.int32)
    moved = interpreted(tpu.window_attention, q, k, v, prefix, mask)
    np.testing.assert_array_equal(moved[0], clean[0])
    assert (np.asarray(moved[1]) != np.asarray(clean[1])).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 32}, "head_dim 32: must be 64 or 128"),
        ({"dtype": jnp.float16}, "queries float16 and cache float16"),
        ({"cache_dtype": jnp.float32}, "queries bfloat16 and cache float32"),
        ({"window": 65}, "65 window rows: at most 64"),
        ({"heads": 128, "window": 64}, "64 window rows of 128 query and 2 key heads: too many for a TPU's memory"),
        ({"page": 8}, "pages of 8 slots: must be a multiple of 16"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change, message):
    sizes = {"window": 2, "heads": 4, "page": 32, "head_dim": 64, "dtype": jnp.bfloat16, **change}
    shape, window = jax.ShapeDtypeStruct, sizes["window"]
    q = shape((1, window, sizes["heads"], sizes["head_dim"]), sizes["dtype"])
    pages = shape((3, 2, sizes["page"], sizes["head_dim"]), sizes.get("cache_dtype", sizes["dtype"]))
    table, prefix, mask = shape((1, 3), jnp.int32), shape((1,), jnp.int32), shape((1, window, window), bool)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tpu.paged_window_attention, q, pages, pages, table, prefix, mask)


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    ("batch", "window", "heads", "kv_heads", "slots", "head_dim", "page", "dtype"),
    [
        (1, 7, 32, 8, 32768, 128, 64, jnp.bfloat16),
        (64, 16, 32, 8, 4096, 128, 128, jnp.bfloat16),
        (2, 64, 64, 8, 2048, 128, 16, jnp.bfloat16),
        (8, 7, 9, 3, 1024, 64, 128, jnp.bfloat16),
        (2, 16, 32, 32, 1024, 128, 64, jnp.bfloat16),
        (2, 1, 4, 4, 40, 64, 16, jnp.float32),
    ],
)
def test_compiles_for_the_chip_and_copies_no_cache(name, batch, window, heads, kv_heads, slots, head_dim, page, dtype):
    with chip(name) as sharding:

        def shape(*sizes, dtype=dtype):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        q, prefix = shape(batch, window, heads, head_dim), shape(batch, dtype=jnp.int32)
        mask, table = shape(batch, window, window, dtype=bool), shape(batch, slots // page, dtype=jnp.int32)
        cache, pages = shape(batch, kv_heads, slots, head_dim), shape(batch * slots // page, kv_heads, page, head_dim)
        for attend, *arguments in (
            (tpu.window_attention, q, cache, cache, prefix, mask),
            (tpu.paged_window_attention, q, pages, pages, table, prefix, mask),
        ):
            compiled = jax.jit(attend).lower(*arguments).compile()
            assert compiled.memory_analysis().temp_size_in_bytes < 2**20
