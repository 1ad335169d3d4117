"""Window attention in Pallas for TPU, over a dense cache and over pages: the cache is read once, as far as it is used.

A step of the grid takes one tile of slots with all key heads of one request; the query heads of a key head are rows of
one product. Steps beyond a request's length do not exist (``work_list``), so short requests beside long ones cost what
they hold, and the next request's first tile is fetched while the last one of this request is computed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.work_list import FIRST, LAST, PARTIAL, work_list

# A score that counts for nothing, finite so that no difference of scores is NaN.
_HIDDEN = -1e30
_LANES = 128
# Slots of a tile, at most, and the memory that its keys, values (twice, as the next are fetched) and scores may take.
_TILE = 512
_TILE_BYTES = 10 * 2**20
MAX_WINDOW = 64
# What one step may take of the 16 MiB that a kernel gets of a v5e's memory, by a count that is a little too high.
_STEP_BYTES = 18 * 2**20


def unsupported(q_BWHd: Array, k: Array, paged: bool) -> str | None:
    """Why the kernel does not cover these arrays, or None if it does."""
    window, head_dim = q_BWHd.shape[1], q_BWHd.shape[3]
    if q_BWHd.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q_BWHd.dtype:
        return f"queries {q_BWHd.dtype} and cache {k.dtype}: both must be bfloat16, or both float32"
    if head_dim not in (64, 128):
        return f"head_dim {head_dim}: must be 64 or 128"
    if window > MAX_WINDOW:
        return f"{window} window rows: at most {MAX_WINDOW}"
    if paged and k.shape[2] % 16:
        return f"pages of {k.shape[2]} slots: must be a multiple of 16"
    if _request_bytes(q_BWHd) + _LANES * _slot_bytes(q_BWHd, k) > _STEP_BYTES:
        return (
            f"{window} window rows of {q_BWHd.shape[2]} query and {k.shape[1]} key heads: too many for a TPU's memory"
        )
    return None


def window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_BKSd: Float[Array, "B K S d"],
    v_BKSd: Float[Array, "B K S d"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
) -> Float[Array, "B W H d"]:
    """As ``reference.window_attention``; slots from ``prefix + W`` on may hold anything.

    Raises ValueError for arrays that ``unsupported`` names.
    """
    tile = min(_tile(q_BWHd, k_BKSd), k_BKSd.shape[2])
    return _attend(q_BWHd, k_BKSd, v_BKSd, prefix_B, mask_BWW, tile, 1, None)


def paged_window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_pages: Float[Array, "P K page d"],
    v_pages: Float[Array, "P K page d"],
    table: Int[Array, "B pages"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
) -> Float[Array, "B W H d"]:
    """``window_attention`` where slot s of request b is slot ``s % page`` of page ``table[b, s // page]``.

    Entries of the table beyond a request's length may hold anything. Raises ValueError as ``window_attention``.
    """
    page = k_pages.shape[2]
    pages_of_step = max(1, min(_tile(q_BWHd, k_pages) // page, table.shape[1]))
    return _attend(q_BWHd, k_pages, v_pages, prefix_B, mask_BWW, page, pages_of_step, table)


def _tile(q: Float[Array, "B W H d"], k: Float[Array, "_ K _ d"]) -> int:
    """Slots of a tile, a power of two: few enough for the memory."""
    fitting = _TILE_BYTES // _slot_bytes(q, k)
    return max(_LANES, min(_TILE, 1 << (fitting.bit_length() - 1)))


def _slot_bytes(q: Float[Array, "B W H d"], k: Float[Array, "_ K _ d"]) -> int:
    """Memory that a slot takes: its keys and values, twice as the next are fetched, and its scores."""
    return 4 * k.shape[1] * max(_LANES, k.shape[3]) * k.dtype.itemsize + 3 * 4 * q.shape[1] * q.shape[2]


def _request_bytes(q: Float[Array, "B W H d"]) -> int:
    """Memory that a request takes: queries and output, both twice, and what is summed over tiles."""
    _, window, heads, head_dim = q.shape
    return window * heads * (max(_LANES, head_dim) * 4 * (q.dtype.itemsize + 1) + 2 * 4 * _LANES)


def _attend(
    q_BWHd: Array,
    k: Float[Array, "P K page d"],
    v: Float[Array, "P K page d"],
    prefix_B: Array,
    mask_BWW: Array,
    page: int,
    pages_of_step: int,
    table: Int[Array, "B pages"] | None,
) -> Float[Array, "B W H d"]:
    """Attention over pages; without a table, page i of request b is the i-th piece of ``page`` slots of row b."""
    if reason := unsupported(q_BWHd, k, table is not None):
        raise ValueError(f"the TPU kernel of window attention does not take {reason}")
    batch, window, heads, head_dim = q_BWHd.shape
    kv_heads = k.shape[1]
    pages = pl.cdiv(k.shape[2], page) if table is None else table.shape[1]
    tile, steps = pages_of_step * page, pl.cdiv(pages, pages_of_step)
    end_of_tile = jnp.arange(1, steps + 1) * tile
    wanted = end_of_tile - tile < prefix_B[:, None] + window
    work = work_list(wanted[:, None], (end_of_tile > prefix_B[:, None])[:, None])

    # XLA keeps the slots minor where that wastes less of a register's 128 lanes than the head does; a kernel that asked
    # for another order would have the cache copied.
    slot_axis = 2 if head_dim % _LANES and page % _LANES == 0 else 1
    if slot_axis == 2:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)

    q, mask_BRW = _pack_rows(q_BWHd, mask_BWW, kv_heads)
    rows = q.shape[2]

    def of_request(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda step, request, *_: (request[step], *(0 for _ in shape)))

    def of_page(i: int) -> pl.BlockSpec:
        def index(step, request, tile_of_cache, flags, prefix, *table) -> tuple:
            row = request[step]
            j = (tile_of_cache[step] - row * steps) * pages_of_step + i
            if not table:
                return row, 0, *((0, j) if slot_axis == 2 else (j, 0))
            # Beyond the last page in use stay where the step before was, so that nothing is fetched.
            last = jnp.minimum(jax.lax.div(prefix[row] + window - 1, page), pages - 1)
            held = jnp.where(j >= pages_of_step, j - pages_of_step, last)
            return table[0][row * pages + jnp.where(j <= last, j, held)], 0, 0, 0

        sizes = (head_dim, page) if slot_axis == 2 else (page, head_dim)
        return pl.BlockSpec((None, kv_heads, *sizes), index)

    specs_of_pages = tuple(of_page(i) for i in range(pages_of_step))
    scalars = (work.major, work.minor, work.flags, prefix_B.astype(jnp.int32))
    if table is not None:
        scalars += (table.astype(jnp.int32).reshape(-1),)

    def body(request, tile_of_cache, flags, prefix, *refs) -> None:
        q, mask, k, v, *rest = refs[len(scalars) - 4 :]
        step = pl.program_id(0)
        row = request[step]
        # The first slot of the tile, counted from the end of the prefix.
        slot = (tile_of_cache[step] - row * steps) * tile - prefix[row]
        _kernel(flags[step], slot, window, slot_axis, q, mask, k, v, *rest)

    statistic = pltpu.VMEM((kv_heads, rows, 1), jnp.float32)
    out = pl.pallas_call(
        body,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(work.count,),
            in_specs=(of_request(*q.shape[1:]), of_request(*mask_BRW.shape[1:]), specs_of_pages, specs_of_pages),
            out_specs=of_request(*q.shape[1:]),
            scratch_shapes=(statistic, statistic, pltpu.VMEM(q.shape[1:], jnp.float32)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="window_attention",
    )(*scalars, q, mask_BRW, (k,) * pages_of_step, (v,) * pages_of_step)
    out = out[:, :, : heads // kv_heads * window].reshape(batch, kv_heads, -1, window, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q_BWHd.shape)


def _pack_rows(
    q_BWHd: Array, mask_BWW: Array, kv_heads: int
) -> tuple[Float[Array, "B K R d"], Float[Array, "B R lanes"]]:
    """The query heads of a key head as rows of one product, whole registers of them, and the mask of these rows."""
    batch, window, heads, head_dim = q_BWHd.shape
    heads_of_kv = heads // kv_heads
    q = q_BWHd.reshape(batch, window, kv_heads, heads_of_kv, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, heads_of_kv * window, head_dim)
    padding = -q.shape[2] % (32 // q.dtype.itemsize)
    mask = jnp.tile(mask_BWW, (1, heads_of_kv, 1)).astype(jnp.bfloat16)
    mask = jnp.pad(mask, ((0, 0), (0, padding), (0, -window % _LANES)))
    return jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0))), mask


def _kernel(flags, slot, window: int, slot_axis: int, q, mask, k_pages, v_pages, out, largest, total, weighted) -> None:
    def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dimensions = (((a_axis,), (b_axis,)), ((0,), (0,)))
        return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def add(hide: Callable[[Array], Array], blank: Callable[[Array], Array]) -> None:
        k, v = (jnp.concatenate([page[...] for page in pages], axis=slot_axis) for pages in (k_pages, v_pages))
        scores = hide(product(q[...], k, 2, 3 - slot_axis) * q.shape[-1] ** -0.5)
        largest_now = jnp.maximum(largest[...], jnp.max(scores, axis=2, keepdims=True))
        weights, shrink = jnp.exp(scores - largest_now), jnp.exp(largest[...] - largest_now)
        largest[...] = largest_now
        total[...] = total[...] * shrink + jnp.sum(weights, axis=2, keepdims=True)
        weighted[...] = weighted[...] * shrink + product(weights.astype(v.dtype), blank(v), 2, slot_axis)

    def hide(scores: Float[Array, "K R t"]) -> Array:
        tail = slot + jax.lax.broadcasted_iota(jnp.int32, (1, scores.shape[2]), 1)
        # Every slot's column of the window's mask, picked by a product with zeros and ones.
        column = jax.lax.broadcasted_iota(jnp.int32, (mask.shape[1], scores.shape[2]), 0)
        picked = jnp.where(column == tail, 1.0, 0.0).astype(mask.dtype)
        in_window = jax.lax.dot(mask[...], picked, preferred_element_type=jnp.float32)
        return jnp.where(((tail < 0) | (in_window > 0.5))[None], scores, _HIDDEN)

    def blank(v: Array) -> Array:
        # Slots beyond the window may hold NaN, which no weight of zero can undo.
        tail = slot + jax.lax.broadcasted_iota(jnp.int32, v.shape, slot_axis)
        return jnp.where(tail < window, v, jnp.zeros_like(v))

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, _HIDDEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(flags & PARTIAL != 0)
    def _() -> None:
        add(hide, blank)

    @pl.when(flags & PARTIAL == 0)
    def _() -> None:
        add(lambda scores: scores, lambda v: v)

    @pl.when(flags & LAST != 0)
    def _() -> None:
        out[...] = (weighted[...] / total[...]).astype(out.dtype)
