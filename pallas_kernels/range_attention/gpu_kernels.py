"""The Mosaic GPU kernels of range attention on Hopper: forward, gradient of the queries, gradients of keys and values.

Two consumer warpgroups compute, a third only loads (``gpu_tiles``). Nothing is added atomically, so runs repeat bit by
bit. Shared memory at head_dim 128: 179, 208 and 196 KiB of 227.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.range_attention.gpu_tiles import (
    CONSUMER_REGISTERS,
    HALF,
    LOADER_REGISTERS,
    PER_COLUMN,
    PER_ROW,
    STAGES,
    TILE,
    Source,
    Visit,
    accumulate,
    accumulate_under,
    drain,
    flatten,
    key_ring,
    launch,
    load_keys,
    mask_scores,
    products,
    spread,
    tile_buffers,
    unflatten,
    walk_keys,
    zeros_of,
)

# Tiles of rows in flight where keys stay.
_KEY_STAGES = 4
_LOG2E = math.log2(math.e)


def forward(
    q_BRHd: Float[Array, "B R H d"], sources: Sequence[Source], interpret: bool = False
) -> tuple[Float[Array, "B R H d"], Float[Array, "B H padded"]]:
    """The attention and, padded to whole tiles, the log-sum-exp of the scores in base 2 (0 for rows that see nothing).

    Blocks of 128 rows of one head. A warpgroup issues the scores of a tile together with the sum over the tile before,
    whose rest runs under the softmax. The two take turns: one's products run under the other's softmax.
    """
    batch, rows, heads, head_dim = q_BRHd.shape
    dtype, kv_heads, tiles = q_BRHd.dtype, sources[0].k_BLKd.shape[2], pl.cdiv(rows, TILE)
    factor = head_dim**-0.5 * _LOG2E

    def kernel(q_ref: Any, *refs: Any, q_s: Any, lse_s: Any, k: Any, v: Any, q_full: Any, turns: Any, **staging: Any):
        *arrays, out_ref, lse_ref = refs
        sources = unflatten(arrays)
        b, head, wg = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("wg")
        tile = tiles - 1 - lax.axis_index("tile")
        (k_ring, k_full, k_free), (v_ring, v_full, v_free) = k, v
        p_s = staging["staging"].at[wg] if interpret else None

        def softmax(scores: Array, largest: Array, total: Array) -> tuple[Array, ...]:
            new = jnp.maximum(largest, scores.max(axis=1) * factor)
            shrink = jnp.exp2(largest - new)
            p = jnp.exp2(scores * factor - spread(new, scores.shape, 0))
            return p, new, total * shrink + p.sum(axis=1), shrink

        def begin(visit: Visit) -> Any:
            plgpu.barrier_wait(q_full.at[wg])
            slot = visit.place.slot
            plgpu.barrier_wait(k_full.at[slot])
            (scores,) = products((q_s.at[wg], visit.place.within(k_ring).T))
            plgpu.barrier_arrive(k_free.at[slot])
            # Finite, so that a row whose first tiles are masked whole does not subtract infinities.
            lowest = plgpu.layout_cast(jnp.full((HALF,), -1e30, jnp.float32), PER_ROW)
            p, largest, total, _ = softmax(visit.masked(scores), lowest, zeros_of(HALF, layout=PER_ROW))
            plgpu.barrier_wait(v_full.at[slot])
            return zeros_of(HALF, head_dim), p.astype(dtype), largest, total, visit.place

        def step(visit: Visit, carry: Any) -> Any:
            (out, p16, largest, total, last), slot = carry, visit.place.slot
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.barrier_wait(turns.at[wg])

            def scored(scores: Array) -> tuple[Array, ...]:
                plgpu.barrier_arrive(k_free.at[slot])
                result = lax.optimization_barrier(softmax(visit.masked(scores), largest, total))
                # Here it keeps the compiler from moving the softmax behind the end of the sum.
                plgpu.barrier_wait(v_full.at[slot])
                return result

            scores, v_s = (q_s.at[wg], visit.place.within(k_ring).T), last.within(v_ring)
            issued = partial(plgpu.barrier_arrive, turns.at[1 - wg])
            out, (p, largest, total, shrink) = accumulate_under(out, p16, v_s, p_s, scores, issued, scored)
            plgpu.barrier_arrive(v_free.at[last.slot])
            return out * spread(shrink, out.shape, 0), p.astype(dtype), largest, total, visit.place

        @pl.when(wg < 2)
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            mine = pl.ds(tile * TILE + wg * HALF, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[b, mine, head], q_s.at[wg], q_full.at[wg])
            pl.when(wg == 1)(partial(plgpu.barrier_arrive, turns.at[0]))
            out, p16, largest, total, last = walk_keys(sources, tile, tiles, (k, v), begin, step)
            (out,) = accumulate(out, p16, last.within(v_ring), p_s)
            plgpu.barrier_arrive(v_free.at[last.slot])
            pl.when(wg == 0)(partial(plgpu.barrier_wait, turns.at[0]))
            empty = total == 0.0
            total = jnp.where(empty, 1.0, total)
            q_s[wg] = (out * spread(1.0 / total, out.shape, 0)).astype(dtype)
            lse_s[wg] = jnp.where(empty, 0.0, largest + jnp.log(total) * _LOG2E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], out_ref.at[b, mine, head])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[b, head, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _() -> None:
            kv_head = lax.div(head, jnp.int32(heads // kv_heads))
            load_keys(sources, tile, tiles, kv_head, (k, v), lag=1)

    lse = jax.ShapeDtypeStruct((batch, heads, tiles * TILE), jnp.float32)
    scratch = {
        "q_s": tile_buffers(HALF, head_dim, dtype, 2),
        "lse_s": plgpu.SMEM((2, HALF), jnp.float32),
        "k": key_ring(head_dim, dtype, STAGES),
        "v": key_ring(head_dim, dtype, STAGES),
        "q_full": plgpu.Barrier(num_barriers=2),
        "turns": plgpu.Barrier(num_barriers=2),
    }
    call = launch(
        kernel,
        (jax.ShapeDtypeStruct(q_BRHd.shape, dtype), lse),
        (batch, tiles, heads),
        scratch,
        tile_buffers(HALF, TILE, dtype, 2),
        interpret,
    )
    return call(q_BRHd, *flatten(sources))


def query_gradient(
    q_BRHd: Float[Array, "B R H d"],
    sources: Sequence[Source],
    d_out_BRHd: Float[Array, "B R H d"],
    lse_BHR: Float[Array, "B H padded"],
    delta_BHR: Float[Array, "B H padded"],
    interpret: bool = False,
) -> Float[Array, "B R H d"]:
    """The cotangent of the queries; ``delta`` is the sum of out · d_out over each row's head."""
    batch, rows, heads, head_dim = q_BRHd.shape
    dtype, kv_heads, tiles = q_BRHd.dtype, sources[0].k_BLKd.shape[2], pl.cdiv(rows, TILE)
    factor = head_dim**-0.5 * _LOG2E

    def kernel(q_ref: Any, d_out_ref: Any, lse_ref: Any, delta_ref: Any, *refs: Any, **scratch: Any) -> None:
        *arrays, dq_ref = refs
        sources = unflatten(arrays)
        b, head, wg = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("wg")
        tile = tiles - 1 - lax.axis_index("tile")
        q_s, d_out_s, loaded = (scratch[name].at[wg] for name in ("q_s", "d_out_s", "loaded"))
        rings = scratch["k"], scratch["v"]
        (k_ring, k_full, k_free), (v_ring, v_full, v_free) = rings
        staging = scratch["staging"].at[wg] if interpret else None

        @pl.when(wg < 2)
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            mine = pl.ds(tile * TILE + wg * HALF, HALF)
            plgpu.copy_gmem_to_smem(q_ref.at[b, mine, head], q_s, loaded)
            plgpu.copy_gmem_to_smem(d_out_ref.at[b, mine, head], d_out_s, loaded)
            lse, delta = (
                plgpu.load(array.at[b, head, mine], layout=PER_ROW, optimized=False) for array in (lse_ref, delta_ref)
            )

            def begin(visit: Visit) -> Array:
                plgpu.barrier_wait(loaded)
                return step(visit, zeros_of(HALF, head_dim))

            def step(visit: Visit, dq: Array) -> Array:
                slot, k_s, v_s = visit.place.slot, visit.place.within(k_ring), visit.place.within(v_ring)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                scores, dp = products((q_s, k_s.T), (d_out_s, v_s.T))
                plgpu.barrier_arrive(v_free.at[slot])
                p = jnp.exp2(visit.masked(scores) * factor - spread(lse, scores.shape, 0))
                ds = p * (dp - spread(delta, dp.shape, 0))
                (dq,) = accumulate(dq, ds.astype(dtype), k_s, staging)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            dq = walk_keys(sources, tile, tiles, rings, begin, step)
            q_s[...] = (dq * head_dim**-0.5).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, dq_ref.at[b, mine, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _() -> None:
            kv_head = lax.div(head, jnp.int32(heads // kv_heads))
            load_keys(sources, tile, tiles, kv_head, rings)

    scratch = {
        "q_s": tile_buffers(HALF, head_dim, dtype, 2),
        "d_out_s": tile_buffers(HALF, head_dim, dtype, 2),
        "k": key_ring(head_dim, dtype, STAGES),
        "v": key_ring(head_dim, dtype, STAGES),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }
    out_type = jax.ShapeDtypeStruct(q_BRHd.shape, dtype)
    call = launch(kernel, out_type, (batch, tiles, heads), scratch, tile_buffers(HALF, TILE, dtype, 2), interpret)
    return call(q_BRHd, d_out_BRHd, lse_BHR, delta_BHR, *flatten(sources))


def key_gradients(
    q_BRHd: Float[Array, "B R H d"],
    source: Source,
    d_out_BRHd: Float[Array, "B R H d"],
    lse_BHR: Float[Array, "B H padded"],
    delta_BHR: Float[Array, "B H padded"],
    interpret: bool = False,
) -> tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]]:
    """The cotangents of one source's keys and values.

    Blocks of 128 keys of one head, 64 a warpgroup, past which the rows of all its query heads come in tiles of 64; all
    scores are held transposed, keys first, so that both sums take them from registers.
    """
    batch, _, heads, head_dim = q_BRHd.shape
    length, kv_heads = source.k_BLKd.shape[1:3]
    dtype, per_kv, tiles, halves = (
        q_BRHd.dtype,
        heads // kv_heads,
        pl.cdiv(length, TILE),
        source.start_BR.shape[1] // HALF,
    )
    factor = head_dim**-0.5 * _LOG2E

    def kernel(q_ref: Any, d_out_ref: Any, lse_ref: Any, delta_ref: Any, *refs: Any, **scratch: Any) -> None:
        *arrays, dk_ref, dv_ref = refs
        (source,) = unflatten(arrays)
        b, tile, kv_head, wg = (lax.axis_index(name) for name in ("batch", "tile", "head", "wg"))
        k_s, v_s, loaded = (scratch[name].at[wg] for name in ("k_s", "v_s", "loaded"))
        rings, full, free = scratch["rings"], scratch["full"], scratch["free"]
        staging = scratch["staging"].at[wg] if interpret else None
        first, count = (source.key_tiles[(b * tiles + tile) * 2 + column] for column in range(2))

        @pl.when(wg < 2)
        def _() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            base = tile * TILE + wg * HALF
            mine = (b, pl.ds(base, HALF), kv_head)
            plgpu.copy_gmem_to_smem(source.k_BLKd.at[mine], k_s, loaded)
            plgpu.copy_gmem_to_smem(source.v_BLKd.at[mine], v_s, loaded)
            plgpu.barrier_wait(loaded)

            def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dk, dv, half = carry
                slot = lax.rem(i, jnp.int32(_KEY_STAGES))
                q_s, d_out_s, lse_s, delta_s, start_s, end_s = (ring.at[slot] for ring in rings)
                largest_start, smallest_end = (source.row_bounds[(b * halves + half) * 2 + side] for side in range(2))
                plgpu.barrier_wait(full.at[slot])
                (scores,) = products((k_s, q_s.T))

                def mask() -> Array:
                    start, end = (plgpu.load(array, layout=PER_COLUMN) for array in (start_s, end_s))
                    return mask_scores(scores, base, start, end, 0)

                whole = (base >= largest_start) & (base + HALF <= smallest_end)
                scores = lax.cond(whole, lambda: scores, mask) * factor
                # Registers are short: the second scores come only now, and vectors when they are needed.
                p = jnp.exp2(scores - spread(plgpu.load(lse_s, layout=PER_COLUMN), scores.shape, 1))
                dv, dp = accumulate(dv, p.astype(dtype), d_out_s, staging, (v_s, d_out_s.T))
                ds = p * (dp - spread(plgpu.load(delta_s, layout=PER_COLUMN), dp.shape, 1))
                (dk,) = accumulate(dk, ds.astype(dtype), q_s, staging)
                plgpu.barrier_arrive(free.at[slot])
                return dk, dv, jnp.where(half + 1 == first + count, first, half + 1)

            zeros = zeros_of(HALF, head_dim)
            dk, dv, _ = lax.fori_loop(0, per_kv * count, step, (zeros, zeros, first))
            k_s[...] = (dk * head_dim**-0.5).astype(dtype)
            v_s[...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s, dk_ref.at[mine])
            plgpu.copy_smem_to_gmem(v_s, dv_ref.at[mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @pl.loop(0, per_kv * count)
            def _(i: Array) -> None:
                slot = lax.rem(i, jnp.int32(_KEY_STAGES))
                head = kv_head * per_kv + lax.div(i, count)
                rows = pl.ds((first + lax.rem(i, count)) * HALF, HALF)
                pl.when(i >= _KEY_STAGES)(partial(plgpu.barrier_wait, free.at[slot]))
                by_row, by_head = (b, rows, head), (b, head, rows)
                parts = [(q_ref, by_row), (d_out_ref, by_row), (lse_ref, by_head), (delta_ref, by_head)]
                parts += [(source.start_BR, (b, rows)), (source.end_BR, (b, rows))]
                for (array, where), ring in zip(parts, rings, strict=True):
                    plgpu.copy_gmem_to_smem(array.at[where], ring.at[slot], full.at[slot])

            drain(per_kv * count, _KEY_STAGES, [free])

    vectors = [plgpu.SMEM((_KEY_STAGES, HALF), vector) for vector in [jnp.float32] * 2 + [jnp.int32] * 2]
    tile = partial(tile_buffers, HALF, head_dim, dtype)
    scratch = {
        "k_s": tile(2),
        "v_s": tile(2),
        "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "rings": (tile(_KEY_STAGES), tile(_KEY_STAGES), *vectors),
        "full": plgpu.Barrier(num_arrivals=6, num_barriers=_KEY_STAGES),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=_KEY_STAGES),
    }
    out_type = (jax.ShapeDtypeStruct(source.k_BLKd.shape, dtype),) * 2
    call = launch(kernel, out_type, (batch, tiles, kv_heads), scratch, tile_buffers(HALF, HALF, dtype, 2), interpret)
    return call(q_BRHd, d_out_BRHd, lse_BHR, delta_BHR, *flatten([source]))
