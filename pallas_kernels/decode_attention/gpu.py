"""Window attention on NVIDIA Hopper (Mosaic GPU): one kernel for dense and for paged caches.

A block of one warpgroup holds up to 64 query rows of one request and one key head: whole window rows, the query heads
of the key head side by side, so that the tensor cores are full. It streams its share of the keys through shared memory,
tile by tile, ahead of the arithmetic; two blocks fit on a multiprocessor, and one computes while the other waits. Where
requests and heads are too few to fill the chip, the keys of each are split over blocks and the parts merged. The online
softmax is flash attention's (arXiv 2205.14135), the split that of its decoding variant.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.decode_attention.packing import ROWS, Packing

# Keys a step; a page must hold a whole number of tiles.
TILE = 64
MAX_WINDOW = 64
HEAD_DIMS = (64, 128)
_THREADS = 128
# Blocks that an H100 or H200 holds at once: two on each of 132 multiprocessors.
_BLOCKS = 264
# A part of fewer tiles than this costs more to merge than it saves, and so does a part beyond this many.
_MIN_TILES, _MAX_SPLITS = 2, 32
# Shared memory for the keys and values of one block: two blocks have 226 KiB, and the queries take 16.
_STAGE_BYTES = 96 * 1024
# Below every score and finite, so that a row that has seen no key yet needs no special case.
_LOWEST = -1e30


@dataclass(frozen=True)
class _Shape(Packing):
    """Static sizes of one call."""

    splits: int

    def all_rows(self, batch: int) -> int:
        """Query rows of the batch, and one more if the merge, which may take two at once, needs it."""
        rows = batch * self.rows * self.heads * self.group
        return rows + rows % 2 * (self.splits > 1)


def window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_BKSd: Float[Array, "B K S d"],
    v_BKSd: Float[Array, "B K S d"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    *,
    splits: int | None = None,
) -> Float[Array, "B W H d"]:
    """As ``reference.window_attention``; bfloat16 or float16, up to 64 rows, head_dim 64 or 128.

    Each row may see up to ``prefix + W <= S`` slots. ``splits`` (default: by the shapes) is the number of blocks that
    share the keys of a request and key head. Raises ValueError for shapes and dtypes that the kernel does not cover.
    """
    pack = packing(q_BWHd, k_BKSd, paged=False)
    return packed_window_attention(pack.packed(q_BWHd), k_BKSd, v_BKSd, None, prefix_B, mask_BWW, pack, splits=splits)


def packed_window_attention(
    q_BKTrd: Float[Array, "B K T stored d"],
    k_PKSd: Float[Array, "P K S d"],
    v_PKSd: Float[Array, "P K S d"],
    pages_BN: Int[Array, "B N"] | None,
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    pack: Packing,
    *,
    splits: int | None = None,
) -> Float[Array, "B W H d"]:
    """As ``paged_window_attention``, or ``window_attention`` without pages, of packed queries.

    ``pack = packing(…)`` has packed them, or somebody else has for it.
    """
    return _attend(q_BKTrd, k_PKSd, v_PKSd, pages_BN, prefix_B, mask_BWW, pack, splits)


def paged_window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_PKSd: Float[Array, "P K page d"],
    v_PKSd: Float[Array, "P K page d"],
    pages_BN: Int[Array, "B N"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    *,
    splits: int | None = None,
) -> Float[Array, "B W H d"]:
    """As ``reference.paged_window_attention``; pages of whole tiles of 64 slots, otherwise as ``window_attention``.

    Entries of ``pages_BN`` after a request's last slot are not read.
    """
    pack = packing(q_BWHd, k_PKSd, paged=True)
    return packed_window_attention(
        pack.packed(q_BWHd), k_PKSd, v_PKSd, pages_BN, prefix_B, mask_BWW, pack, splits=splits
    )


def packing(q_BWHd: Array | jax.ShapeDtypeStruct, k: Array, paged: bool) -> Packing:
    """How the kernel wants such queries; raises ValueError where it does not cover these arrays."""
    if reason := unsupported(q_BWHd, k, paged):
        raise ValueError(f"the Hopper kernel of window attention does not take {reason}")
    return Packing(q_BWHd.shape[1], k.shape[1], q_BWHd.shape[2] // k.shape[1])


def unsupported(q_BWHd: Array | jax.ShapeDtypeStruct, k: Array, paged: bool) -> str | None:
    """Why the kernel does not cover these arrays, or None if it does."""
    rows, heads, head_dim = q_BWHd.shape[1:]
    if q_BWHd.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q_BWHd.dtype:
        return f"queries {q_BWHd.dtype} and cache {k.dtype}: both must be bfloat16, or both float16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: must be 64 or 128"
    if rows > MAX_WINDOW:
        return f"{rows} window rows: at most {MAX_WINDOW}"
    if heads // k.shape[1] > ROWS:
        return f"{heads // k.shape[1]} query heads a key head: at most {ROWS}"
    if k.shape[2] % 8:
        return f"a cache of {k.shape[2]} slots: must be a multiple of 8"
    if paged and k.shape[2] % TILE:
        return f"pages of {k.shape[2]} slots: must be a multiple of {TILE}"
    return None


def choose_splits(blocks: int, slots: int) -> int:
    """Parts of the keys of each request and key head, where ``blocks`` of them would run unsplit over ``slots``."""
    return max(1, min(_BLOCKS // blocks, math.ceil(slots / TILE) // _MIN_TILES, _MAX_SPLITS))


# Layers of one shape share one trace, hence one compiled kernel.
@partial(jax.jit, static_argnames=("pack", "splits"))
def _attend(
    q: Float[Array, "B K T stored d"],
    k: Array,
    v: Array,
    pages_BN: Array | None,
    prefix_B: Array,
    mask_BWW: Array,
    pack: Packing,
    splits: int | None,
) -> Array:
    batch, heads, tiles, _, head_dim = q.shape
    slots = k.shape[2] * (1 if pages_BN is None else pages_BN.shape[1])
    if splits is None:
        splits = choose_splits(batch * heads * tiles, slots)
    shape = _Shape(pack.rows, heads, pack.group, splits)
    page_table = () if pages_BN is None else (pages_BN.astype(jnp.int32),)
    outputs = _parts(q, k, v, page_table, prefix_B.astype(jnp.int32), _mask_bits(mask_BWW, shape), shape)
    out = outputs[0][0] if splits == 1 else _merge(outputs[0], outputs[1], shape, q.dtype)
    rows = batch * pack.rows * heads * pack.group
    return out[:rows].reshape(batch, pack.rows, heads * pack.group, head_dim)


def _mask_bits(mask_BWW: Bool[Array, "B W W"], shape: _Shape) -> Int[Array, "B T words rows"]:
    """The window keys that each packed row sees, 32 a word."""
    batch, rows, _ = mask_BWW.shape
    words = math.ceil(rows / 32)
    more_rows = shape.tiles * shape.tile_window - rows
    mask = jnp.pad(mask_BWW, ((0, 0), (0, more_rows), (0, 32 * words - rows))).reshape(batch, -1, words, 32)
    bits: UInt32[Array, "B W words"] = jnp.sum(mask.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=-1)
    bits = jnp.repeat(bits.reshape(batch, shape.tiles, shape.tile_window, words), shape.group, axis=2).swapaxes(2, 3)
    bits = jnp.pad(bits, ((0, 0), (0, 0), (0, 0), (0, ROWS - bits.shape[3])))
    return jax.lax.bitcast_convert_type(bits, jnp.int32)


def _parts(
    q: Float[Array, "B K T rows d"],
    k: Float[Array, "P K S d"],
    v: Float[Array, "P K S d"],
    page_table: tuple[()] | tuple[Int[Array, "B N"]],
    prefix_B: Int[Array, " B"],
    bits: Int[Array, "B T words 64"],
    shape: _Shape,
) -> list[Array]:
    """The attention kernel: [1, R, d] for all rows R, (request, window row, query head), if the keys are not split.

    Otherwise, in float32, the parts: sums of weighted values [splits, R, d], and the base-2 maximum and the sum of the
    weights of each packed row [splits, B, KT, 2, 64].
    """
    batch, heads, tiles, stored, head_dim = q.shape
    words = math.ceil(shape.rows / 32)
    tiles_a_page = math.ceil(k.shape[2] / TILE)
    all_tiles = tiles_a_page * (page_table[0].shape[1] if page_table else 1)
    to_log2 = head_dim**-0.5 * math.log2(math.e)
    wgmma, by_row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    out_types = [jax.ShapeDtypeStruct((1, shape.all_rows(batch), head_dim), q.dtype)]
    if shape.splits > 1:
        out_types = [
            jax.ShapeDtypeStruct((shape.splits, shape.all_rows(batch), head_dim), jnp.float32),
            jax.ShapeDtypeStruct((shape.splits, batch, heads * tiles, 2, ROWS), jnp.float32),
        ]

    def along_row(x_R: Array, like: Array) -> Array:
        return jax.lax.broadcast_in_dim(x_R, like.shape, [0])

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def kernel(q_ref, k_ref, v_ref, *refs):
        (*table_ref, prefix_ref, bits_ref), outputs = refs[: len(page_table) + 2], refs[len(page_table) + 2 : -2]
        q_smem, q_barrier = refs[-2:]
        request, split, head_tile = (jax.lax.axis_index(name) for name in ("request", "split", "head_tile"))
        head, row_tile = jax.lax.div(head_tile, tiles), jax.lax.rem(head_tile, tiles)
        plgpu.copy_gmem_to_smem(q_ref.at[request, head, row_tile], q_smem.at[pl.ds(0, stored)], q_barrier)
        prefix = prefix_ref[request]
        # A window that would not fit (its request waits) must not lead out of the page table.
        needed = jnp.minimum(jax.lax.div(prefix + (shape.rows + TILE - 1), TILE), all_tiles)
        first = jax.lax.div(split * needed, shape.splits)
        last = jax.lax.div((split + 1) * needed, shape.splits)

        def locate(step):
            tile = first + step
            if not table_ref:
                return request, head, tile, 0
            page = table_ref[0][request, jax.lax.div(tile, tiles_a_page)]
            return page, head, jax.lax.rem(tile, tiles_a_page), 0

        def hide_window_keys(scores, slot):
            offset = slot - prefix + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=wgmma)
            visible = offset < 0
            for word in range(words):
                row_bits = plgpu.load(bits_ref.at[request, row_tile, word], layout=by_row, optimized=False)
                place = offset - 32 * word
                bit = jax.lax.shift_right_logical(along_row(row_bits, scores), jnp.clip(place, 0, 31)) & 1
                visible = visible | ((bit == 1) & (place >= 0) & (place < 32))
            return jnp.where(visible, scores, -jnp.inf)

        def step(index, k_smem, v_smem, carry):
            acc, largest, total = carry
            # Not before the loop: the first keys are on their way by now.
            pl.when(index[0] == 0)(lambda: plgpu.barrier_wait(q_barrier))

            def scores_of(product):
                plgpu.wgmma(product, q_smem, k_smem.T)
                return product[...]

            scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, TILE), jnp.float32))
            slot = (first + index[0]) * TILE
            scores = jax.lax.cond(slot + TILE > prefix, lambda s: hide_window_keys(s, slot), lambda s: s, scores)
            new_largest = jnp.maximum(largest, scores.max(axis=1) * to_log2)
            shrink = jnp.exp2(largest - new_largest)
            weights = jnp.exp2(scores * to_log2 - along_row(new_largest, scores))
            total = total * shrink + weights.sum(axis=1)
            # The keys of this step are spent: their buffer carries the weights to the tensor cores.
            weights_smem = k_smem.at[:, pl.ds(0, TILE)]
            weights_smem[...] = weights.astype(q_smem.dtype)
            plgpu.commit_smem()

            def values_of(product):
                plgpu.wgmma(product, weights_smem, v_smem)
                return product[...]

            acc = acc * along_row(shrink, acc) + pl.run_scoped(values_of, plgpu.ACC((ROWS, head_dim), jnp.float32))
            return acc, new_largest, total

        block = plgpu.BlockSpec((None, None, TILE, head_dim), locate, transforms=tiled)
        acc, largest, total = plgpu.emit_pipeline(
            step,
            grid=(last - first,),
            in_specs=[block, block],
            max_concurrent_steps=_STAGE_BYTES // (2 * TILE * head_dim * k.dtype.itemsize),
            init_carry=(
                full((ROWS, head_dim), 0.0, wgmma),
                full((ROWS,), _LOWEST, by_row),
                full((ROWS,), 0.0, by_row),
            ),
        )(k_ref, v_ref)
        pl.when(last == first)(lambda: plgpu.barrier_wait(q_barrier))
        split_up = shape.splits > 1

        def store(out_smem, stats_smem):
            out_smem[...] = (acc if split_up else acc * along_row(1 / total, acc)).astype(out_smem.dtype)
            if split_up:
                stats_smem[0], stats_smem[1] = largest, total
            plgpu.commit_smem()
            begin = row_tile * shape.tile_window

            @pl.loop(0, jnp.minimum(shape.tile_window, shape.rows - begin))
            def _(row):
                target = ((request * shape.rows + begin + row) * heads + head) * shape.group
                source = out_smem.at[pl.ds(row * shape.group, shape.group)]
                plgpu.copy_smem_to_gmem(source, outputs[0].at[split, pl.ds(target, shape.group)])

            if split_up:
                plgpu.copy_smem_to_gmem(stats_smem, outputs[1].at[split, request, head_tile])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(store, plgpu.SMEM((ROWS, head_dim), out_types[0].dtype), plgpu.SMEM((2, ROWS), jnp.float32))

    return plgpu.kernel(
        kernel,
        out_type=out_types,
        scratch_types=[plgpu.SMEM((ROWS, head_dim), q.dtype, transforms=tiled), plgpu.Barrier()],
        grid=(batch, shape.splits, heads * tiles),
        grid_names=("request", "split", "head_tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(q, k, v, *page_table, prefix_B, bits)


def _merge(
    parts: Float[Array, "splits R d"], stats: Float[Array, "splits B KT 2 64"], shape: _Shape, dtype: jnp.dtype
) -> Float[Array, "R d"]:
    """The softmax over all keys from its parts.

    A kernel for this, too: XLA would make four of it, and at batch 1 each launch costs about as much as the reading.
    """
    splits, all_rows, head_dim = parts.shape
    heads, rows_a_block = shape.heads * shape.group, _THREADS // head_dim
    layout = plgpu.Layout.WG_STRIDED((rows_a_block, head_dim), vec_size=1)

    def kernel(parts_ref, stats_ref, out_ref):
        first = jax.lax.axis_index("rows") * rows_a_block

        def statistics(row):
            """Where a row's maximum and sum stand, of all the splits."""
            row = jnp.minimum(row, stats.shape[1] * shape.rows * heads - 1)  # the row that fills up a block of two
            row, query = jax.lax.div(row, heads), jax.lax.rem(row, heads)
            request, row = jax.lax.div(row, shape.rows), jax.lax.rem(row, shape.rows)
            head, query = jax.lax.div(query, shape.group), jax.lax.rem(query, shape.group)
            row_tile, row = jax.lax.div(row, shape.tile_window), jax.lax.rem(row, shape.tile_window)
            return stats_ref.at[:, request, head * shape.tiles + row_tile, :, row * shape.group + query]

        by_row = [statistics(first + row) for row in range(rows_a_block)]
        second = plgpu.broadcasted_iota(jnp.int32, (rows_a_block, head_dim), 0, layout=layout) == 1

        def spread(values):
            """One number a row over its row."""
            arrays = [jnp.full((rows_a_block, head_dim), value, jnp.float32) for value in values]
            return arrays[0] if len(arrays) == 1 else jnp.where(second, arrays[1], arrays[0])

        def add(split, carry):
            acc, largest, total = carry
            part = plgpu.load(parts_ref.at[split, pl.ds(first, rows_a_block)], layout=layout, optimized=False)
            part_largest = spread([row[split, 0] for row in by_row])
            part_total = spread([row[split, 1] for row in by_row])
            new_largest = jnp.maximum(largest, part_largest)
            shrink, weight = jnp.exp2(largest - new_largest), jnp.exp2(part_largest - new_largest)
            return acc * shrink + part * weight, new_largest, total * shrink + part_total * weight

        zeros, lowest = (
            plgpu.layout_cast(jnp.full((rows_a_block, head_dim), value, jnp.float32), layout)
            for value in (0.0, _LOWEST)
        )
        # Unrolled, so that all reads are under way at once.
        acc, _, total = jax.lax.fori_loop(0, splits, add, (zeros, lowest, zeros), unroll=True)
        out_ref[pl.ds(first, rows_a_block)] = (acc / total).astype(dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((all_rows, head_dim), dtype),
        grid=(all_rows // rows_a_block,),
        grid_names=("rows",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(parts, stats)
