"""Between the products of a decode layer on NVIDIA GPUs: one Triton kernel for each of the three gaps.

At a few rows a step waits for launches, not for bytes. Each kernel here is all that runs between two products, with a
gated LoRA or without; the caches are written where they are. Meanwhile the memory has nothing to do: each kernel also
asks for the first weights of the product that comes next, which then finds them in the L2 cache.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.packing import Packing
from pallas_kernels.decode_layer import triton_kernels
from pallas_kernels.decode_layer.product import FEW_ROWS, Normed, Product, splits_of
from pallas_kernels.decode_layer.reference import TILE
from pallas_kernels.triton_graphs import use_typed_calls

use_typed_calls()

# Up to so many rows a step waits for launches and memory, and programs are as small as they can be: one warp, since
# ptxas gives the threads of a larger block too few registers to hold all that they ask for.
_FEW_ROWS, _FEWEST_ROWS = 64, 2
# Rows of a tile with a LoRA: the fewest that the tensor cores take. Where there are many, more, so that its second
# matrix is not read again for every few rows, as long as their summands fit into registers.
_ROWS, _MANY_ROWS, _SUMMANDS = 16, 64, 128
# Bytes of weights to ask for ahead: as many as the memory brings while such a kernel runs and the next is launched, and
# for the rotation while attention runs, less what that reads itself of what the cache may hold.
_AHEAD, _AHEAD_OF_ATTENTION, _L2 = 6 * 2**20, 20 * 2**20, 24 * 2**20
# The hardware takes whole vectors of 16 bytes.
_VECTOR = 16
# Operands of every kernel: the summands of a product and what it may lack.
_OPTIONAL = 5


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(rows: int, splits: int, rank: int) -> tuple[int, int]:
    """Rows of a tile, and the warps of the program that finishes it."""
    if rows <= _FEW_ROWS:
        return (_ROWS, 8) if rank else (_FEWEST_ROWS, 1)
    return min(_MANY_ROWS, _SUMMANDS // splits) if rank else _ROWS, 8


def _constants(product: Product) -> dict[str, Any]:
    splits, batch, rows, columns = product.parts_SBWC.shape
    expand, squares = product.expand, product.squares_BWT
    tiles = 0 if squares is None else squares.shape[-1]
    rank = 0 if expand is None else len(expand.b_RN)
    tile_rows, warps = _tile(batch * rows, splits, rank)
    return {
        "R": batch * rows,
        "W": rows,
        "C": columns,
        "N": product.columns,
        "SPLITS": splits,
        "BIAS": product.bias_N is not None,
        "T": tiles,
        "TILES": _power_of_two(max(tiles, 1)),
        "INPUTS": product.inputs,
        "EPSILON": product.epsilon,
        "RANK": rank,
        "RANKS": max(_ROWS, _power_of_two(max(rank, 1))),
        "LORA_SCALE": 1.0 if expand is None else expand.scale,
        "FIRST_ROW": 0 if expand is None else expand.first_row,
        "ROWS": tile_rows,
        "num_warps": warps,
    }


def _ahead(kernel_IC: Array | None, rows: int, lanes: int, limit: int) -> dict[str, int]:
    """Which bytes of a kernel to ask for, ``limit`` at most, by so many lanes: those that its product reads first.

    Lane after lane asks for a piece; the pieces are spread over as many runs as the sums of the product are split over.
    """
    piece, pieces, runs, run = 0, 1, 1, 0
    if kernel_IC is not None and rows <= FEW_ROWS:
        runs = splits_of(rows, *kernel_IC.shape)
        run = kernel_IC.nbytes // runs
        pieces = max(1, lanes // runs)
        piece = min(limit // runs, run) // pieces // _VECTOR * _VECTOR if run % _VECTOR == 0 else 0
    return {"PIECE": piece, "PIECES": pieces, "RUNS": runs, "RUN": run}


def _call(
    kernel: Any,
    product: Product,
    others: tuple[Array, ...],
    ahead_IC: Array | None,
    limit: int,
    columns: int,
    rows: int | None = None,
    **further: Any,
) -> Any:
    """Launch programs for tiles of the product's rows (or of so many of them) by so many tiles of columns.

    Operands that are absent are stood for by the summands, and not read.
    """
    constants, parts = _constants(product), product.parts_SBWC
    grid = math.ceil((constants["R"] if rows is None else rows) / constants["ROWS"]), columns
    lanes = grid[0] * grid[1] * triton_kernels.LANES.value
    ahead = _ahead(ahead_IC, constants["R"], lanes, limit)
    b = None if product.expand is None else product.expand.b_RN
    optional = (product.bias_N, product.squares_BWT, b, ahead_IC)
    return jax_triton.triton_call(
        parts,
        *(parts if operand is None else operand for operand in optional),
        *others,
        kernel=kernel,
        grid=grid,
        THREADS=32 * constants["num_warps"],
        **constants,
        **ahead,
        **further,
    )


def add(
    x_BWD: Float[Array, "B W D"],
    product: Product,
    scale_D: Float[Array, " D"],
    ahead_IC: Float[Array, "I C"] | None = None,
) -> tuple[Float[Array, "B W D"], Normed]:
    """As ``reference.add``."""
    tiles = math.ceil(product.columns / TILE)
    like_x = jax.ShapeDtypeStruct(x_BWD.shape, x_BWD.dtype)
    squares = jax.ShapeDtypeStruct((*x_BWD.shape[:2], tiles), jnp.float32)
    x, scaled, squares_BWT = _call(
        triton_kernels.add_rows,
        product,
        (x_BWD, scale_D),
        ahead_IC,
        _AHEAD,
        tiles,
        out_shape=[like_x, like_x, squares],
        TILE=TILE,
    )
    return x, Normed(scaled, squares_BWT)


def gated(product: Product, dtype: jnp.dtype, ahead_IC: Float[Array, "I C"] | None = None) -> Float[Array, "B W F"]:
    """As ``reference.gated``."""
    splits, batch, rows, _ = product.parts_SBWC.shape
    width = product.columns // 2
    wide = product.expand is not None and splits == 1 and batch * rows > _FEW_ROWS
    tile = 2 * TILE if wide else TILE
    out = jax.ShapeDtypeStruct((batch, rows, width), dtype)
    columns = math.ceil(width / tile)
    return _call(triton_kernels.gate_rows, product, (), ahead_IC, _AHEAD, columns, out_shape=out, TILE=tile)


def rotate_and_store(
    product: Product,
    scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None,
    tables: tuple[Float[Array, "B W half"], Float[Array, "B W half"]],
    k_PKSd: Float[Array, "P K S d"],
    v_PKSd: Float[Array, "P K S d"],
    length_B: Int[Array, " B"],
    first: int = 0,
    pack: Packing | None = None,
    ahead_IC: Float[Array, "I C"] | None = None,
) -> tuple[Float[Array, "P W H d"] | Float[Array, "P K T stored d"], Float[Array, "P K S d"], Float[Array, "P K S d"]]:
    """As ``reference.rotate_and_store``, with the caches written in place.

    Rows that fill up a tile of packed queries are not written.
    """
    parts_SBWC = product.parts_SBWC
    rows = parts_SBWC.shape[2]
    requests, heads, slots, head_dim = k_PKSd.shape
    query_heads = product.columns // head_dim - 2 * heads
    others = (*((parts_SBWC,) * 2 if scales is None else scales), *tables, length_B, k_PKSd, v_PKSd)
    caches = _OPTIONAL + len(others) - 2
    q_shape = (requests, rows, query_heads, head_dim) if pack is None else pack.shape(requests, head_dim)
    q, cache = (jax.ShapeDtypeStruct(shape, k_PKSd.dtype) for shape in (q_shape, k_PKSd.shape))
    return tuple(
        _call(
            triton_kernels.rotate_rows,
            product,
            others,
            ahead_IC,
            min(_AHEAD_OF_ATTENTION, max(0, _L2 - k_PKSd.nbytes - v_PKSd.nbytes)),
            query_heads + 2 * heads,
            requests * rows,
            out_shape=[q, cache, cache],
            input_output_aliases={caches: 1, caches + 1: 2},
            FIRST=first,
            POOL=requests,
            H=query_heads,
            K=heads,
            S=slots,
            HALF=head_dim // 2,
            NORM=scales is not None,
            TILES_Q=1 if pack is None else pack.tiles,
            TILE_WINDOW=rows if pack is None else pack.tile_window,
            STORED=0 if pack is None else pack.stored,
        )
    )
