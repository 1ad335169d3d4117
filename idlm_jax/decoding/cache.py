"""The key/value cache: one pair of arrays a layer, [batch, key/value heads, slots, head_dim].

A token's slot is its position. A round writes its W rows into slots length … length + W - 1 in row order; clean rows
come first, so the accepted ones already lie where they belong, and the rest is overwritten by the next round.

A round reads every slot, used or not. A batch whose requests differ in length may therefore keep several pairs a layer,
*pools* of consecutive requests with as many slots each as they need.

Or the cache is *paged* (vLLM's, arXiv 2309.06180): the batch axis counts pages of a few slots each, and a table says
which pages are a request's, in order of its slots.
"""

from collections.abc import Callable, Sequence
from itertools import batched

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.backbone.qwen3 import Attend
from idlm_jax.backbone.sharding import cache_spec
from idlm_jax.config import ModelConfig
from pallas_kernels.decode_attention.api import paged_window_attention, window_attention
from pallas_kernels.decode_attention.reference import place_in_pages
from pallas_kernels.dispatch import on_each_device

# Keys and values, of each pool in turn; or pages of both.
LayerCache = tuple[Float[Array, "B K S d"], ...]
Cache = tuple[LayerCache, ...]

# Slots of a page: whole tiles of the attention kernels.
PAGE = 64
# The page that is nobody's: what is written where no request runs lands here, and nobody reads it.
BIN = 0

# The smallest cache, prefill chunk and output buffer; larger ones double, so that few programs are compiled.
SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """The smallest size (a power of two, at least SMALLEST_BUCKET) that holds ``length`` slots."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache of one pool."""
    return init_pools(config, [(batch, slots)], dtype)


def init_pages(config: ModelConfig, pages: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache of pages of some slots; on a mesh each device has its key heads of all of them."""
    return _init(config, [(pages, slots)], dtype, shared=True)


def init_pools(config: ModelConfig, pools: Sequence[tuple[int, int]], dtype: jnp.dtype) -> Cache:
    """An empty cache of (requests, slots each) pools; on a mesh each device has its requests and key heads."""
    return _init(config, pools, dtype, shared=False)


def _init(config: ModelConfig, pools: Sequence[tuple[int, int]], dtype: jnp.dtype, shared: bool) -> Cache:
    heads, size, mesh = config.num_key_value_heads, config.head_dim, jax.sharding.get_abstract_mesh()

    def empty(batch: int, slots: int) -> Array:
        spec = None if mesh.empty else cache_spec(mesh, 1 if shared else batch, heads)
        return jnp.zeros((batch, heads, slots, size), dtype, out_sharding=spec)

    def layer() -> LayerCache:
        return tuple(empty(*pool) for pool in pools for _ in ("k", "v"))

    return tuple(layer() for _ in range(config.num_hidden_layers))


def cache_bytes(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> int:
    """Memory of such a cache in bytes."""
    per_layer = 2 * batch * config.num_key_value_heads * slots * config.head_dim
    return config.num_hidden_layers * per_layer * jnp.dtype(dtype).itemsize


def write_rows(
    cache: Float[Array, "P K S d"],
    rows: Float[Array, "B W K d"],
    length_B: Int[Array, " B"],
    pages_BN: Int[Array, "B N"] | None = None,
) -> Float[Array, "P K S d"]:
    """Store W rows at slots ``length … length + W - 1`` of every request; the cache must have room for them."""
    if pages_BN is not None:
        slot_BW = length_B[:, None] + jnp.arange(rows.shape[1])
        page_BW, place_BW = place_in_pages(pages_BN, slot_BW, cache.shape[2])
        return cache.at[page_BW, :, place_BW].set(rows.astype(cache.dtype))

    def store(cache_KSd: Array, rows_KWd: Array, length: Array) -> Array:
        return jax.lax.dynamic_update_slice(cache_KSd, rows_KWd, (0, length, 0))

    rows_BKWd = rows.swapaxes(1, 2).astype(cache.dtype)
    if cache.shape[0] == 1:
        # vmap makes a scatter of it, and XLA guards each with a bounds check: two kernels a layer at batch 1.
        return store(cache[0], rows_BKWd[0], length_B[0])[None]
    return jax.vmap(store)(cache, rows_BKWd, length_B)


def over_pools(
    attend: Callable[[slice, Array, Array], tuple[Array, Array, Array]],
    state: LayerCache,
    pages_BN: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B W H d"], LayerCache]:
    """Attention of one layer: ``attend`` sees the requests of a pool, their keys and their values.

    It returns the output of these requests and the new keys and values. All requests share pages.
    """
    outputs, stored, first = [], [], 0
    for keys, values in batched(state, 2):
        pool = slice(first, first + len(keys if pages_BN is None else pages_BN))
        first = pool.stop
        out, keys, values = attend(pool, keys, values)
        outputs.append(out)
        stored += [keys, values]
    return jnp.concatenate(outputs), tuple(stored)


def attend_window(
    q_BWHd: Float[Array, "B W H d"],
    keys: Float[Array, "P K S d"],
    values: Float[Array, "P K S d"],
    pages_BN: Int[Array, "B N"] | None,
    length_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    implementation: str,
) -> Float[Array, "B W H d"]:
    """Attention of a window whose keys and values are stored, over pages or without them."""
    if pages_BN is None:
        return window_attention(q_BWHd, keys, values, length_B, mask_BWW, implementation=implementation)
    return paged_window_attention(q_BWHd, keys, values, pages_BN, length_B, mask_BWW, implementation=implementation)


def cached_attention(
    length_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    implementation: str = "auto",
    pages_BN: Int[Array, "B N"] | None = None,
) -> Attend:
    """Attention of a window over a cache: store the window's keys and values, then attend to prefix and window."""

    def store_and_attend(
        q: Array, keys: Array, values: Array, k: Array, v: Array, length: Array, mask: Array, pages: Array | None
    ) -> tuple[Array, Array, Array]:
        assert keys.shape[1] == k.shape[2], "a cache that does not lie as init_pools and init_pages lay it"
        keys, values = (write_rows(old, new, length, pages) for old, new in ((keys, k), (values, v)))
        return attend_window(q, keys, values, pages, length, mask, implementation), keys, values

    def attend(q: Array, k: Array, v: Array, state: LayerCache) -> tuple[Array, LayerCache]:
        def attend_pool(pool: slice, keys: Array, values: Array) -> tuple[Array, Array, Array]:
            stored, new = (q[pool], keys, values), (k[pool], v[pool], length_B[pool], mask_BWW[pool])
            return on_each_device(store_and_attend, *stored, *new, pages_BN, like=stored)

        return over_pools(attend_pool, state, pages_BN)

    return attend
