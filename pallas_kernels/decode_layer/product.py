"""A matrix product of a few rows that is not finished yet.

It is handed over so that whatever follows it finishes it in the same launch: its summands where the summed axis was
split over blocks, the norm of its input, which is one factor a row and commutes with the product, its bias, and a gated
LoRA, whose first half rode in the product as further columns. All of it is float32 until the one rounding at the end.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA's cost model counts blocks of this many rows and columns on as many multiprocessors as an H100 has. It splits a
# product again, and adds the summands up in a launch of its own, unless the splits here are about those it would make.
_BLOCK, _MULTIPROCESSORS = 212, 132
_MAX_SPLITS, _MIN_SUMMED = 8, 256
# With more rows than this a product is wide enough.
_FEW_ROWS = 256
# With more rows than this, float32 results of a product that is not split cost more than they bring.
_FLOAT32_ROWS = 64


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Normed:
    """Rows scaled as an RMSNorm scales them, but not yet divided by their root mean square."""

    values_BWD: Float[Array, "B W D"]
    # Sums of squares of the rows before scaling, a tile of columns each.
    squares_BWT: Float[Array, "B W T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Expand:
    """The second half of a gated LoRA: ``scale * shrunk @ b`` on window rows from ``first_row`` on."""

    b_RN: Float[Array, "R N"]
    scale: float = _static()
    first_row: int = _static()
    # Columns of each projection in the product; the R shrunk columns of each follow after all of these.
    widths: tuple[int, ...] = _static()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """A product of window rows that is not finished yet."""

    # Summands, a power of two of them; the first ``columns`` columns, and after them those of the LoRA's first half.
    parts_SBWC: Float[Array, "S B W C"]
    bias_N: Float[Array, " N"] | None
    # Of the input, where that is a ``Normed``.
    squares_BWT: Float[Array, "B W T"] | None
    expand: Expand | None
    columns: int = _static()
    # Length of the input rows, and what the norm adds to their mean square.
    inputs: int = _static()
    epsilon: float = _static()

    def finished(self) -> Float[Array, "B W N"]:
        """The product in float32."""
        total = jnp.sum(self.parts_SBWC.astype(jnp.float32), axis=0)
        y = total[:, :, : self.columns]
        if self.expand is not None:
            first = self.expand.first_row
            delta = _expanded(total[:, first:, self.columns :], self.expand)
            y = jnp.concatenate([y[:, :first], y[:, first:] + self.expand.scale * delta], axis=1)
        if self.squares_BWT is not None:
            mean = jnp.sum(self.squares_BWT, axis=-1, keepdims=True) / self.inputs
            y = y * jax.lax.rsqrt(mean + self.epsilon)
        return y if self.bias_N is None else y + self.bias_N.astype(jnp.float32)


def _expanded(shrunk_BMC: Float[Array, "B M C"], expand: Expand) -> Float[Array, "B M N"]:
    rank, begin, deltas = len(expand.b_RN), 0, []
    for part, width in enumerate(expand.widths):
        shrunk = shrunk_BMC[:, :, part * rank : (part + 1) * rank].astype(expand.b_RN.dtype)
        b = expand.b_RN[:, begin : begin + width]
        precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
        deltas.append(jnp.matmul(shrunk, b, precision=precision, preferred_element_type=jnp.float32))
        begin += width
    return jnp.concatenate(deltas, axis=-1)


def splits_of(rows: int, inputs: int, columns: int) -> int:
    """Over how many blocks the sums of a product of a few rows are split, so that the chip is full."""
    blocks, splits = math.ceil(rows / _BLOCK) * math.ceil(columns / _BLOCK), 1
    while (
        rows <= _FEW_ROWS
        and 2 * splits * blocks <= _MULTIPROCESSORS
        and 2 * splits <= _MAX_SPLITS
        and inputs % (2 * splits) == 0
        and inputs >= 2 * splits * _MIN_SUMMED
    ):
        splits *= 2
    return splits


def multiply(
    x: "Float[Array, 'B W I'] | Normed",
    kernel_IC: Float[Array, "I C"],
    bias_N: Float[Array, " N"] | None,
    expand: Expand | None,
    columns: int,
    epsilon: float,
    split_over: str | None = None,
) -> Product:
    """The product of rows and a kernel; ``columns`` are those before the columns of a LoRA's first half.

    Where the devices of the mesh axis ``split_over`` have parts of the inputs each, all get the whole sums. Those of a
    device are one summand by then, as few bytes as can be, and rounded once if there are many rows.

    A single row is multiplied twice at once and each result halved, which is exact: XLA makes a matrix product of two
    rows, but multiplications and sums of one.
    """
    values = x.values_BWD if isinstance(x, Normed) else x
    batch, rows, inputs = values.shape
    alone = batch * rows == 1
    values_BWI = jnp.broadcast_to(values, (2, 1, inputs)) if alone else values
    splits = splits_of(batch * rows, inputs, kernel_IC.shape[1])
    unsplit_dtype = jnp.float32 if batch * rows <= _FLOAT32_ROWS else values.dtype
    multiplied = partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32 if splits > 1 else unsplit_dtype,
    )
    if splits == 1:
        parts = multiplied("bwi,ic->bwc", values_BWI, kernel_IC)
    else:
        values_RSI = values_BWI.reshape(-1, splits, inputs // splits)
        parts = multiplied("rsi,sic->src", values_RSI, kernel_IC.reshape(splits, -1, kernel_IC.shape[1]))
    parts_SBWC = (0.5 * parts if alone else parts).reshape(-1, batch, rows, kernel_IC.shape[1])
    if split_over is not None:
        parts_SBWC = jax.lax.psum(jnp.sum(parts_SBWC, axis=0, keepdims=True).astype(unsplit_dtype), split_over)
    squares = x.squares_BWT if isinstance(x, Normed) else None
    return Product(parts_SBWC, bias_N, squares, expand, columns, inputs, epsilon)
