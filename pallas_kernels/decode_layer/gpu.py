"""Between the products of a decode layer on NVIDIA GPUs: one Triton kernel for each of the three gaps.

At a few rows a step waits for launches, not for bytes. Each kernel here is all that runs between two products, with a
gated LoRA or without; the caches are written where they are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.packing import Packing
from pallas_kernels.decode_layer import triton_kernels
from pallas_kernels.decode_layer.product import Normed, Product
from pallas_kernels.decode_layer.reference import TILE
from pallas_kernels.triton_graphs import use_typed_calls

use_typed_calls()

# Up to so many rows a step waits for launches and memory, and programs are as small as they can be: one warp, since
# ptxas gives the threads of a larger block too few registers to hold all that they ask for.
_FEW_ROWS, _FEWEST_ROWS = 64, 2
# Rows of a tile with a LoRA: the fewest that the tensor cores take. Where there are many, more, so that its second
# matrix is not read again for every few rows, as long as their summands fit into registers.
_ROWS, _MANY_ROWS, _SUMMANDS = 16, 64, 128


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(rows: int, splits: int, rank: int) -> tuple[int, int]:
    """Rows of a tile, and the warps of the program that finishes it."""
    if rows <= _FEW_ROWS:
        return (_ROWS, 8) if rank else (_FEWEST_ROWS, 1)
    return min(_MANY_ROWS, _SUMMANDS // splits) if rank else _ROWS, 8


def _operands(product: Product) -> tuple[Array, Array, Array, Array]:
    """What every kernel reads of a product; the summands stand for what it lacks, which is not read."""
    parts, expand = product.parts_SBWC, product.expand
    bias, squares = product.bias_N, product.squares_BWT
    b = parts if expand is None else expand.b_RN
    return parts, parts if bias is None else bias, parts if squares is None else squares, b


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


def add(
    x_BWD: Float[Array, "B W D"], product: Product, scale_D: Float[Array, " D"]
) -> tuple[Float[Array, "B W D"], Normed]:
    """As ``reference.add``."""
    constants = _constants(product)
    tiles = math.ceil(product.columns / TILE)
    parts, bias, squares, b = _operands(product)
    like_x = jax.ShapeDtypeStruct(x_BWD.shape, x_BWD.dtype)
    x, scaled, squares_BWT = jax_triton.triton_call(
        x_BWD,
        scale_D,
        parts,
        bias,
        squares,
        b,
        kernel=triton_kernels.add_rows,
        out_shape=[like_x, like_x, jax.ShapeDtypeStruct((*x_BWD.shape[:2], tiles), jnp.float32)],
        grid=(math.ceil(constants["R"] / constants["ROWS"]), tiles),
        TILE=TILE,
        **constants,
    )
    return x, Normed(scaled, squares_BWT)


def gated(product: Product, dtype: jnp.dtype) -> Float[Array, "B W F"]:
    """As ``reference.gated``."""
    constants, width = _constants(product), product.columns // 2
    tile = 2 * TILE if constants["ROWS"] == _MANY_ROWS and constants["SPLITS"] == 1 else TILE
    return jax_triton.triton_call(
        *_operands(product),
        kernel=triton_kernels.gate_rows,
        out_shape=jax.ShapeDtypeStruct((*product.parts_SBWC.shape[1:3], width), dtype),
        grid=(math.ceil(constants["R"] / constants["ROWS"]), math.ceil(width / tile)),
        TILE=tile,
        **constants,
    )


def rotate_and_store(
    product: Product,
    scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None,
    tables: tuple[Float[Array, "B W half"], Float[Array, "B W half"]],
    k_PKSd: Float[Array, "P K S d"],
    v_PKSd: Float[Array, "P K S d"],
    length_B: Int[Array, " B"],
    first: int = 0,
    pack: Packing | None = None,
    pages_BN: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "P W H d"] | Float[Array, "P K T stored d"], Float[Array, "P K S d"], Float[Array, "P K S d"]]:
    """As ``reference.rotate_and_store``, with the caches written in place.

    Rows that fill up a tile of packed queries are not written.
    """
    constants = _constants(product)
    _, heads, slots, head_dim = k_PKSd.shape
    requests = len(k_PKSd if pages_BN is None else pages_BN)
    rows = constants["W"]
    query_heads = product.columns // head_dim - 2 * heads
    # Lengths stand for the pages that are not there.
    wheres = length_B, length_B if pages_BN is None else pages_BN
    operands = (*_operands(product), *((product.parts_SBWC,) * 2 if scales is None else scales), *tables, *wheres)
    q_shape = (requests, rows, query_heads, head_dim) if pack is None else pack.shape(requests, head_dim)
    q, cache = (jax.ShapeDtypeStruct(shape, k_PKSd.dtype) for shape in (q_shape, k_PKSd.shape))
    return tuple(
        jax_triton.triton_call(
            *operands,
            k_PKSd,
            v_PKSd,
            kernel=triton_kernels.rotate_rows,
            out_shape=[q, cache, cache],
            grid=(math.ceil(requests * rows / constants["ROWS"]), query_heads + 2 * heads),
            input_output_aliases={len(operands): 1, len(operands) + 1: 2},
            FIRST=first,
            POOL=requests,
            H=query_heads,
            K=heads,
            S=slots,
            PAGES=0 if pages_BN is None else pages_BN.shape[1],
            HALF=head_dim // 2,
            NORM=scales is not None,
            TILES_Q=1 if pack is None else pack.tiles,
            TILE_WINDOW=rows if pack is None else pack.tile_window,
            STORED=0 if pack is None else pack.stored,
            **constants,
        )
    )
