"""What the Mosaic GPU kernels of range attention share: tables of visible tiles, rings of tiles, and walks over them.

A *source* is an array of keys and values with an interval of it for every row. The first is the clean keys; a second,
where there are mask groups, is the rows' own keys. Tables say which tiles can hold a visible pair: others are never
loaded, and tiles that all of a warpgroup's rows see whole skip its mask.

TMA clips: rows beyond the end of an array read as zeros and are not written.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Rows or keys of one warpgroup, the least that wgmma takes, and of the two that share a block.
HALF, TILE = 64, 128
# TMA takes tiles of 8 rows, and the callers' arrays must hold a whole number of them.
MULTIPLE = 8
# Own keys before a tile's that groups of its first rows may hold; slots of rings have room for them.
HALO = 16
# Tiles of keys in flight.
STAGES = 2
# Of 504 that three warpgroups may share.
CONSUMER_REGISTERS, LOADER_REGISTERS = 240, 24
_ROW_MAJOR = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_LAYOUT = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


class Source(NamedTuple):
    """Keys and values, and the interval of them that each row sees."""

    k_BLKd: Float[Array, "B L K d"]
    v_BLKd: Float[Array, "B L K d"]
    # Rows are padded with empty intervals to whole tiles.
    start_BR: Int[Array, "B R"]
    end_BR: Int[Array, "B R"]
    # For each TILE of rows: the first tile of keys and the number of them.
    row_tiles: Int[Array, " B*tiles*2"]
    # For each HALF of rows: the largest start and the smallest end.
    row_bounds: Int[Array, " B*halves*2"]
    # For each TILE of keys: the first HALF of rows that may see it, and the number of them.
    key_tiles: Int[Array, " B*tiles*2"]


def make_source(
    k_BLKd: Float[Array, "B L K d"],
    v_BLKd: Float[Array, "B L K d"],
    start_BR: Int[Array, "B R"],
    end_BR: Int[Array, "B R"],
) -> Source:
    """Pad the intervals, which lie inside 0 … L, to whole tiles and derive the tables."""
    batch, length = k_BLKd.shape[:2]
    padding = ((0, 0), (0, -start_BR.shape[1] % TILE))
    start, end = (jnp.pad(bound.astype(jnp.int32), padding) for bound in (start_BR, end_BR))
    # Rows that see nothing do not widen what their tile must visit.
    first = jnp.where(end > start, start, length).reshape(batch, -1, HALF).min(2)
    last = jnp.where(end > start, end, 0).reshape(batch, -1, HALF).max(2)
    bounds = start.reshape(batch, -1, HALF).max(2), end.reshape(batch, -1, HALF).min(2)

    lowest, highest = first.reshape(batch, -1, 2).min(2), last.reshape(batch, -1, 2).max(2)
    key_tile = lowest // TILE
    count = jnp.maximum(-(-highest // TILE) - key_tile, 0)
    # Rows that see nothing visit one tile too, masked whole, so that a walk always has a first one.
    key_tile, count = jnp.where(count > 0, key_tile, 0), jnp.maximum(count, 1)

    base = jnp.arange(0, length, TILE)[:, None]
    sees = (first[:, None] < base + TILE) & (last[:, None] > base)
    half = jnp.arange(sees.shape[2])
    first_half = jnp.min(jnp.where(sees, half, sees.shape[2]), axis=2)
    halves = jnp.maximum(jnp.max(jnp.where(sees, half + 1, 0), axis=2) - first_half, 0)

    def table(*columns: Array) -> Array:
        return jnp.stack(columns, axis=2).reshape(-1).astype(jnp.int32)

    return Source(k_BLKd, v_BLKd, start, end, table(key_tile, count), table(*bounds), table(first_half, halves))


def zeros_of(*shape: int, layout: Any = _LAYOUT) -> Array:
    """Zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(vector: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A vector along one axis of a tile."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def mask_scores(scores: Array, key_base: Array, start: Array, end: Array, key_axis: int) -> Array:
    """-inf where the key is outside of the row's interval."""
    key = key_base + plgpu.broadcasted_iota(jnp.int32, scores.shape, key_axis, layout=_LAYOUT)
    start, end = (spread(bound, scores.shape, 1 - key_axis) for bound in (start, end))
    return jnp.where((key >= start) & (key < end), scores, -jnp.inf)


def products(*pairs: tuple[Any, Any]) -> list[Array]:
    """``a @ b`` in float32 for operands in shared memory, all in flight at once."""

    def compute(*accumulators: Any) -> list[Array]:
        for accumulator, pair in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, *pair)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(compute, *(plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def accumulate(total: Array, a: Array, b_ref: Any, staging: Any, *pairs: tuple[Any, Any]) -> list[Any]:
    """``total + a @ b`` with ``a`` from registers, and the products of more pairs, all in flight at once.

    The interpreter takes ``a`` from shared memory only.
    """
    if staging is not None:
        staging = staging.at[:, pl.ds(0, a.shape[1])]
        staging[...] = a
        plgpu.commit_smem()
        product, *others = products((staging, b_ref), *pairs)
        return [total + product, *others]

    def compute(accumulators: Sequence[Any]) -> None:
        for accumulator, pair in zip(accumulators, [(a, b_ref), *pairs], strict=True):
            plgpu.wgmma(accumulator, *pair)

    zeros = [zeros_of(left.shape[0], right.shape[1]) for left, right in pairs]
    return pl.run_state(compute)([plgpu.ACC.init(array) for array in (total, *zeros)])


def accumulate_under(
    total: Array,
    a: Array,
    b_ref: Any,
    staging: Any,
    pair: tuple[Any, Any],
    issued: Callable[[], None],
    then: Callable[[Array], Any],
) -> tuple[Array, Any]:
    """``total + a @ b`` and ``then(product of pair)``, which computes while the former still runs.

    ``issued`` is called when both products are in flight.
    """
    if staging is not None:
        staging[...] = a
        plgpu.commit_smem()

    def compute(product: Any, accumulator: Any) -> tuple[Array, Any]:
        if staging is None:
            accumulator[...] = total
        plgpu.wgmma(product, *pair)
        plgpu.wgmma(accumulator, a if staging is None else staging, b_ref)
        issued()
        others = then(plgpu.wgmma_accumulator_load(product, wait_n=1))
        return accumulator[...], others

    scratch = (plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32) for left, right in (pair, (a, b_ref)))
    result, others = pl.run_scoped(compute, *scratch)
    return result if staging is None else total + result, others


def launch(
    body: Callable[..., None],
    out_type: Any,
    grid: tuple[int, int, int],
    scratch: dict[str, Any],
    staging: Any,
    interpret: bool,
) -> Callable[..., Any]:
    """Two consumer warpgroups and a loading one for every cell of the grid (batch, tile, head)."""
    if interpret:
        scratch = scratch | {"staging": staging}
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        # The last axis runs fastest: tiles start in order, the heaviest first, and heads share their keys in L2.
        grid_names=("batch", "tile", "head"),
        num_threads=3,
        thread_name="wg",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        compiler_params=plgpu.CompilerParams(approx_math=not interpret),
    )


def tile_buffers(rows: int, head_dim: int, dtype: Any, copies: int) -> Any:
    """Tiles in shared memory, laid out for TMA and wgmma."""
    return plgpu.SMEM((copies, rows, head_dim), dtype, transforms=_ROW_MAJOR)


def _own_base(tile: Array) -> Array:
    """The first of the HALO + TILE own keys that a tile's rows can see."""
    return jnp.maximum(tile * TILE - HALO, 0)


def load_keys(
    sources: Sequence[Any], tile: Array, tiles: int, kv_head: Array, rings: Sequence[tuple[Any, ...]], lag: int = 0
) -> None:
    """The loading warpgroup: the rows' own keys, then the clean ones tile by tile, as slots come free.

    Values come ``lag`` tiles behind the keys: a ring must not wait for a slot while the other's tile is needed sooner.
    """
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    batch = lax.axis_index("batch")
    clean, *own = sources
    for source in own:
        where = (batch, pl.ds(_own_base(tile), HALO + TILE), kv_head)
        for array, (ring, full, _) in zip(source[:2], rings, strict=True):
            plgpu.copy_gmem_to_smem(array.at[where], ring.at[0], full.at[0])
    before = len(own)
    first, count = (clean.row_tiles[(batch * tiles + tile) * 2 + column] for column in range(2))

    def load(array: Any, ring: tuple[Any, ...], i: Array) -> None:
        buffer, full, free = ring
        slot = lax.rem(i, jnp.int32(STAGES))
        pl.when(i >= STAGES)(partial(plgpu.barrier_wait, free.at[slot]))
        where = (batch, pl.ds((first + i - before) * TILE, TILE), kv_head)
        plgpu.copy_gmem_to_smem(array.at[where], buffer.at[slot, pl.ds(0, TILE)], full.at[slot])

    @pl.loop(before, before + count + lag)
    def _(i: Array) -> None:
        pl.when(i < before + count)(partial(load, clean.k_BLKd, rings[0], i))
        pl.when(i >= before + lag)(partial(load, clean.v_BLKd, rings[1], i - lag))

    drain(before + count, STAGES, [free for _, _, free in rings])


def drain(count: Array, stages: int, barriers: Sequence[Any]) -> None:
    """Wait until the last tiles of a ring are consumed: nobody may leave barriers behind that still change."""

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(i: Array) -> None:
        for free in barriers:
            plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])


class Place(NamedTuple):
    """Where the rings hold a tile of keys."""

    slot: Array
    # Keys of the slot before the tile, over HALO: of the rows' own keys the second warpgroup takes the last TILE ones.
    skipped: Array

    def within(self, ring: Any) -> Any:
        """The tile itself."""
        return ring.at[self.slot, pl.ds(self.skipped * HALO, TILE)]


class Visit(NamedTuple):
    """A tile of keys that a warpgroup's rows may see."""

    place: Place
    # Sets scores of invisible pairs to -inf.
    masked: Callable[[Array], Array]


def walk_keys(
    sources: Sequence[Any],
    tile: Array,
    tiles: int,
    rings: Sequence[tuple[Any, ...]],
    begin: Callable[[Visit], Any],
    step: Callable[[Visit, Any], Any],
) -> Any:
    """A consumer: ``begin`` and then ``step`` on every tile that its rows may see, their own keys first."""
    batch, wg = lax.axis_index("batch"), lax.axis_index("wg")
    rows = pl.ds(tile * TILE + wg * HALF, HALF)

    def interval(source: Any) -> tuple[Array, Array]:
        start, end = (
            plgpu.load(array.at[batch, rows], layout=PER_ROW, optimized=False)
            for array in (source.start_BR, source.end_BR)
        )
        return start, end

    clean, *own = sources
    entry = (batch * tiles + tile) * 2
    first, count = (clean.row_tiles[entry + column] for column in range(2))
    largest_start, smallest_end = (clean.row_bounds[(entry + wg) * 2 + side] for side in range(2))
    start, end = interval(clean)
    before = len(own)

    def visit(i: Array) -> Visit:
        base = (first + i - before) * TILE

        def masked(scores: Array) -> Array:
            whole = (base >= largest_start) & (base + TILE <= smallest_end)
            return lax.cond(whole, lambda: scores, lambda: mask_scores(scores, base, start, end, 1))

        return Visit(Place(lax.rem(i, jnp.int32(STAGES)), jnp.where(i < before, wg, 0)), masked)

    opening = visit(jnp.int32(0))
    if own:
        base, bounds = _own_base(tile) + wg * HALO, interval(own[0])
        opening = opening._replace(masked=lambda scores: mask_scores(scores, base, *bounds, 1))
    return lax.fori_loop(1, before + count, lambda i, carry: step(visit(i), carry), begin(opening))


def key_ring(head_dim: int, dtype: Any, stages: int) -> tuple[Any, ...]:
    """Slots for tiles, their full barriers, and their free ones, on which both consumers arrive."""
    return (
        tile_buffers(HALO + TILE, head_dim, dtype, stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )


def flatten(sources: Sequence[Source]) -> list[Array]:
    """The operands of a kernel, which takes no trees."""
    return [array for source in sources for array in source]


def unflatten(refs: Sequence[Any]) -> list[Any]:
    """Sources of references, inside a kernel."""
    width = len(Source._fields)
    return [Source(*refs[i : i + width]) for i in range(0, len(refs), width)]
