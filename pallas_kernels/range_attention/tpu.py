"""Range attention in Pallas for TPU: flash attention over the tiles of keys that some row of a tile of rows sees.

The query heads of one key head are rows of one product, so keys and values are never repeated. Scores are held
transposed, keys × rows: the statistics of a row are then one lane each and maxima and sums run over sublanes, and the
gradients of keys and values are plain products. Rows stand in blocks of whole mask groups, so a block meets its own
keys in one small square whose mask never changes; a tile of rows is several blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.range_attention.reference import GroupKV
from pallas_kernels.work_list import FIRST, LAST, PARTIAL, WorkList, work_list

# Rows that share their own keys; the number of lanes, so that blocks are cut free of cost.
_BLOCK = 128
_ROW_MAJOR = Layout(major_to_minor=(0, 1, 2, 3))
# A score that counts for nothing, finite so that no difference of scores is NaN.
_HIDDEN = -1e30
_LOG2E = float(np.log2(np.e))
# Rows of ``_Plan.intervals`` where the two kinds begin.
_CLEAN, _OWN = 0, 2
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles, multiples of 128."""

    # Rows of a tile times query heads of a key head, at most (but never less than 128 rows).
    packed_rows: int = 1024
    keys: int = 512


def refusal(dtype: Any, head_dim: int, group_size: int) -> str | None:
    """Why the kernels cannot take such inputs, or None."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128):
        return f"head_dim 64 or 128, not {head_dim}"
    if group_size > _BLOCK:
        return f"groups of up to {_BLOCK} rows, not {group_size}"
    return None


class _Plan(NamedTuple):
    """What the kernels need to know of the intervals. T tiles of rows and N of keys, batch row after batch row."""

    # First and end key of every packed row, counted from the first key of the batch; then those of its own group,
    # counted from the first row of its block.
    intervals: Int[Array, "T 4 P"]
    by_rows: WorkList
    by_keys: WorkList


def range_attention(
    q_BRHd: Float[Array, "B R H d"],
    k_BLKd: Float[Array, "B L K d"],
    v_BLKd: Float[Array, "B L K d"],
    start_BR: Int[Array, "B R"],
    end_BR: Int[Array, "B R"],
    group: GroupKV | None = None,
    group_size: int = 1,
    *,
    tiles: Tiles = Tiles(),
) -> Float[Array, "B R H d"]:
    """As ``reference.range_attention``; a row that sees no key gives zeros, and no gradient.

    Keys that no row sees may hold any finite values. Raises ValueError for inputs that ``refusal`` names, and for rows
    that are not whole groups.
    """
    batch, rows, heads, head_dim = q_BRHd.shape
    length, kv_heads = k_BLKd.shape[1:3]
    if reason := refusal(q_BRHd.dtype, head_dim, group_size):
        raise ValueError(f"range attention by the TPU kernels: {reason}")
    if group is not None and rows % group_size:
        raise ValueError(f"{rows} rows are not whole groups of {group_size} rows")
    # Else XLA may lay queries out with rows last, up to the product that makes them, and libtpu 0.0.48 aborts on that
    # product when it compiles a training step of Qwen3-8B for one v6e.
    q_BRHd, k_BLKd, v_BLKd = (with_layout_constraint(array, _ROW_MAJOR) for array in (q_BRHd, k_BLKd, v_BLKd))
    heads_of_kv = heads // kv_heads
    real = _BLOCK if group is None else _BLOCK // group_size * group_size
    blocks = max(1, min(tiles.packed_rows // (heads_of_kv * _BLOCK), -(-rows // real)))
    tile_keys = min(tiles.keys, length + -length % _BLOCK)

    to_tiles = partial(_to_tiles, blocks=blocks, real=real, size=_BLOCK)
    start, end = (to_tiles(array, mode="edge") for array in (start_BR, jnp.clip(end_BR, 0, length)))
    plan = _plan(start, end, -(-length // tile_keys), tile_keys, heads_of_kv, group_size)
    q = to_tiles(q_BRHd).reshape(-1, blocks, _BLOCK, kv_heads, heads_of_kv, head_dim).transpose(0, 3, 1, 4, 2, 5)
    k, v = (_by_heads(_to_tiles(array, 1, tile_keys, tile_keys)) for array in (k_BLKd, v_BLKd))
    own = tuple(_by_heads(to_tiles(array)) for array in group or ())
    out = _attention(q.reshape(*q.shape[:2], -1, head_dim), k, v, own, plan)
    out = out.reshape(q.shape).transpose(0, 2, 4, 1, 3, 5)[:, :, :real]
    return out.reshape(batch, -1, heads, head_dim)[:, :rows]


def _to_tiles(array: Array, blocks: int, real: int, size: int, mode: str = "constant") -> Array:
    """[B, R, …] to [B, tiles, blocks, size, …]; ``real`` slots of a block are rows of the array, others padding."""

    def pad(array: Array, axis: int, size: int) -> Array:
        return jnp.pad(array, [(0, size * (i == axis)) for i in range(array.ndim)], mode=mode)

    array = pad(array, 1, -array.shape[1] % (blocks * real))
    array = array.reshape(array.shape[0], -1, blocks, real, *array.shape[2:])
    return pad(array, 3, size - real)


def _by_heads(array: Float[Array, "B n blocks size K d"]) -> Float[Array, "T K t d"]:
    return array.reshape(-1, array.shape[2] * array.shape[3], *array.shape[4:]).swapaxes(1, 2)


def _plan(
    start: Int[Array, "B T blocks size"],
    end: Int[Array, "B T blocks size"],
    key_tiles: int,
    tile_keys: int,
    heads_of_kv: int,
    group_size: int,
) -> _Plan:
    batch, row_tiles = start.shape[:2]
    first_key = jnp.arange(key_tiles) * tile_keys
    start_BTRN, end_BTRN = (array.reshape(batch, row_tiles, -1, 1) for array in (start, end))
    sees = (start_BTRN < end_BTRN) & (start_BTRN < first_key + tile_keys) & (end_BTRN > first_key)
    wanted = jnp.any(sees, axis=2)
    partial = ~jnp.all((start_BTRN <= first_key) & (end_BTRN >= first_key + tile_keys), axis=2)

    offset = jnp.arange(batch).reshape(-1, 1, 1, 1) * (key_tiles * tile_keys)
    row = jnp.broadcast_to(jnp.arange(_BLOCK), start.shape)
    intervals = jnp.stack([start + offset, end + offset, row // group_size * group_size, row + 1], axis=2)
    # Blocks hold their rows once for every query head.
    intervals = jnp.tile(intervals.astype(jnp.int32), heads_of_kv).reshape(batch * row_tiles, 4, -1)
    by_keys = work_list(wanted.swapaxes(1, 2), partial.swapaxes(1, 2))
    return _Plan(intervals, work_list(wanted, partial), by_keys)


@jax.custom_vjp
def _attention(
    q: Float[Array, "T K P d"],
    k: Float[Array, "N K t d"],
    v: Float[Array, "N K t d"],
    own: tuple[Float[Array, "T K r d"], ...],
    plan: _Plan,
) -> Float[Array, "T K P d"]:
    return _forward(q, k, v, own, plan)[0]


def _attention_fwd(q: Array, k: Array, v: Array, own: tuple[Array, ...], plan: _Plan) -> tuple[Array, tuple]:
    out, lse = _forward(q, k, v, own, plan)
    return out, (q, k, v, own, plan, out, lse)


def _attention_bwd(residuals: tuple, d_out: Array) -> tuple:
    q, k, v, own, plan, out, lse = residuals
    # Rows of softmax's Jacobian need Σ_k p_k dp_k, which is the product of a row's output and its gradient.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, None]
    d_q, d_own = _backward_rows(q, k, v, own, plan, d_out, lse, delta)
    # Its own kernel, so that nothing of it is left where the keys are constants.
    d_k, d_v = _backward_keys(q, k, v, plan, d_out, lse, delta)
    return d_q, d_k, d_v, d_own, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(
    q: Array, k: Array, v: Array, own: tuple[Array, ...], plan: _Plan
) -> tuple[Float[Array, "T K P d"], Float[Array, "T K 1 P"]]:
    """The output, and the log-sum-exp of every row's scores in units of log 2."""
    tiles, heads, rows, head_dim = q.shape
    statistic = pltpu.VMEM((1, rows), jnp.float32)
    return _call(
        _forward_kernel,
        plan.by_rows,
        majors=(plan.intervals, q, own),
        minors=(k, v),
        outputs=(q, jax.ShapeDtypeStruct((tiles, heads, 1, rows), jnp.float32)),
        scratch=(statistic, statistic, pltpu.VMEM((head_dim, rows), jnp.float32)),
    )


def _forward_kernel(_, key_tile, flags, of_rows, of_keys, outputs, scratch) -> None:
    (intervals, q, own), (k, v), (out, lse) = of_rows, of_keys, outputs
    largest, total, weighted = scratch

    def add(k, v, visible: Array | None, rows: slice = slice(None)) -> None:
        scores = _scores(q[rows], k, visible)
        largest_before = largest[:, rows]
        largest_now = jnp.maximum(largest_before, jnp.max(scores, axis=0, keepdims=True))
        weights, shrink = jnp.exp2(scores - largest_now), jnp.exp2(largest_before - largest_now)
        largest[:, rows] = largest_now
        total[:, rows] = total[:, rows] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        weighted[:, rows] = weighted[:, rows] * shrink + _product(v, weights.astype(v.dtype), _TN)

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, _HIDDEN)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)
        for keys, rows in _blocks(q, own):
            add(own[0][keys], own[1][keys], _visible(intervals, _OWN, _BLOCK, rows=rows), rows)

    _masked_or_not(flags, intervals, key_tile, k.shape[0], lambda visible: add(k[...], v[...], visible))

    @pl.when(flags & LAST != 0)
    def _() -> None:
        # A row that saw hidden keys only has a total, too, but no key.
        some = largest[...] > _HIDDEN / 2
        out[...] = jnp.where(some, weighted[...] / total[...], 0.0).T.astype(out.dtype)
        # Nothing is left of any score that this is taken from.
        lse[...] = jnp.where(some, largest[...] + jnp.log2(total[...]), -_HIDDEN)


def _backward_rows(
    q: Array, k: Array, v: Array, own: tuple[Array, ...], plan: _Plan, d_out: Array, lse: Array, delta: Array
) -> tuple[Float[Array, "T K P d"], tuple[Float[Array, "T K r d"], ...]]:
    """Gradients of the queries, and of the keys and values of groups."""
    return _call(
        _backward_rows_kernel,
        plan.by_rows,
        majors=(plan.intervals, q, d_out, lse, delta, own),
        minors=(k, v),
        outputs=(q, own),
        scratch=(pltpu.VMEM((q.shape[3], q.shape[2]), jnp.float32),),
    )


def _backward_rows_kernel(_, key_tile, flags, of_rows, of_keys, outputs, scratch) -> None:
    (intervals, q, d_out, lse, delta, own), (k, v), (d_q, d_own), (sum_q,) = of_rows, of_keys, outputs, scratch

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        sum_q[...] = jnp.zeros_like(sum_q)
        for keys, rows in _blocks(q, own):
            k, v, visible = own[0][keys], own[1][keys], _visible(intervals, _OWN, _BLOCK, rows=rows)
            of_block = (q[rows], d_out[rows], lse[:, rows], delta[:, rows])
            weights, d_scores = _weights_and_d_scores(*of_block, k, v, visible)
            sum_q[:, rows] = _product(k, d_scores, _TN)
            d_own[0][keys] = (_product(d_scores, q[rows], _NN) * q.shape[1] ** -0.5).astype(d_own[0].dtype)
            d_own[1][keys] = _product(weights, d_out[rows], _NN).astype(d_own[1].dtype)

    def add(visible: Array | None) -> None:
        _, d_scores = _weights_and_d_scores(q[...], d_out[...], lse[...], delta[...], k[...], v[...], visible)
        sum_q[...] += _product(k[...], d_scores, _TN)

    _masked_or_not(flags, intervals, key_tile, k.shape[0], add)

    @pl.when(flags & LAST != 0)
    def _() -> None:
        d_q[...] = (sum_q[...].T * q.shape[1] ** -0.5).astype(d_q.dtype)


def _backward_keys(
    q: Array, k: Array, v: Array, plan: _Plan, d_out: Array, lse: Array, delta: Array
) -> tuple[Float[Array, "N K t d"], Float[Array, "N K t d"]]:
    """Gradients of the clean keys and values."""
    return _call(
        _backward_keys_kernel,
        plan.by_keys,
        majors=(k, v),
        minors=(plan.intervals, q, d_out, lse, delta),
        outputs=(k, v),
        scratch=(pltpu.VMEM(k.shape[2:], jnp.float32), pltpu.VMEM(v.shape[2:], jnp.float32)),
    )


def _backward_keys_kernel(key_tile, _, flags, of_keys, of_rows, outputs, scratch) -> None:
    (k, v), (intervals, q, d_out, lse, delta), (d_k, d_v), (sum_k, sum_v) = of_keys, of_rows, outputs, scratch

    @pl.when(flags & FIRST != 0)
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def add(visible: Array | None) -> None:
        weights, d_scores = _weights_and_d_scores(q[...], d_out[...], lse[...], delta[...], k[...], v[...], visible)
        sum_k[...] += _product(d_scores, q[...], _NN)
        sum_v[...] += _product(weights, d_out[...], _NN)

    _masked_or_not(flags, intervals, key_tile, k.shape[0], add)

    @pl.when(flags & LAST != 0)
    def _() -> None:
        d_k[...] = (sum_k[...] * q.shape[1] ** -0.5).astype(d_k.dtype)
        d_v[...] = sum_v[...].astype(d_v.dtype)


def _product(a: Array, b: Array, dimensions: tuple) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, visible: Bool[Array, "t P"] | None) -> Float[Array, "t P"]:
    """Transposed scores in units of log 2."""
    scores = _product(k, q, _NT) * (q.shape[-1] ** -0.5 * _LOG2E)
    return scores if visible is None else jnp.where(visible, scores, _HIDDEN)


def _weights_and_d_scores(
    q: Array, d_out: Array, lse: Array, delta: Array, k: Array, v: Array, visible: Bool[Array, "t P"] | None
) -> tuple[Float[Array, "t P"], Float[Array, "t P"]]:
    """Transposed probabilities and gradients of the scores (without the factor head_dim^-1/2), in the inputs' dtype."""
    weights = jnp.exp2(_scores(q, k, visible) - lse)
    d_scores = weights * (_product(v, d_out, _NT) - delta)
    return weights.astype(q.dtype), d_scores.astype(q.dtype)


def _visible(
    intervals, kind: int, keys: int, first_key: Array | int = 0, rows: slice = slice(None)
) -> Bool[Array, "t P"]:
    """Which of the keys from ``first_key`` on each row sees, by its interval of that kind."""
    start, end = intervals[kind : kind + 1, rows], intervals[kind + 1 : kind + 2, rows]
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, (keys, start.shape[1]), 0)
    return (key >= start) & (key < end)


def _blocks(q, own: tuple) -> list[tuple[slice, slice]]:
    """The keys and the packed rows of every block that has keys of its own."""
    blocks = own[0].shape[0] // _BLOCK if own else 0
    return [
        (slice(i * _BLOCK, (i + 1) * _BLOCK), slice(i * q.shape[0] // blocks, (i + 1) * q.shape[0] // blocks))
        for i in range(blocks)
    ]


def _masked_or_not(flags, intervals, key_tile, keys: int, add: Callable[[Array | None], None]) -> None:
    @pl.when(flags & PARTIAL != 0)
    def _() -> None:
        add(_visible(intervals, _CLEAN, keys, key_tile * keys))

    @pl.when(flags & PARTIAL == 0)
    def _() -> None:
        add(None)


def _call(kernel: Callable, work: WorkList, majors: Any, minors: Any, outputs: Any, scratch: tuple) -> Any:
    """Run a kernel over key heads and the pairs of a work list.

    ``majors`` and ``minors`` are trees of arrays [tiles, heads, …] (or [tiles, …], the same for all heads), ``outputs``
    one of shapes, tiles of the major side; scratch lives as long as a major tile. The kernel gets the number of the
    pair's tiles, its flags, and the four trees.
    """

    def specs(tree: Any, side: int) -> Any:
        def spec(array: Array) -> pl.BlockSpec:
            heads = (None,) * (array.ndim - 3)
            return pl.BlockSpec(
                (None, *heads, *array.shape[-2:]),
                lambda head, step, *lists: (lists[side][step], *(head for _ in heads), 0, 0),
            )

        return jax.tree.map(spec, tree)

    def body(major, minor, flags, majors, minors, *rest) -> None:
        step = pl.program_id(1)
        *outputs, scratch = rest
        kernel(major[step], minor[step], flags[step], majors, minors, outputs, scratch)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(jax.tree.leaves(outputs)[0].shape[1], work.count),
        in_specs=(specs(majors, 0), specs(minors, 1)),
        out_specs=specs(outputs, 0),
        scratch_shapes=(scratch,),
    )
    run = pl.pallas_call(
        body,
        jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), outputs),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=kernel.__name__.strip("_"),
    )
    return run(work.major, work.minor, work.flags, majors, minors)
