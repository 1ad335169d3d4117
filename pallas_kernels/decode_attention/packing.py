"""How the Hopper kernel of window attention wants its queries: the rows that share a key head, tile by tile."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

# Rows of a tile: those of one product on the tensor cores.
ROWS = 64


@dataclass(frozen=True)
class Packing:
    """Packed row r of a tile is window row ``r // group`` of it, query head ``r % group`` of the key head."""

    rows: int  # W
    heads: int  # K
    group: int  # G, query heads a key head

    @property
    def tiles(self) -> int:
        """Row tiles a key head."""
        return math.ceil(self.rows / (ROWS // self.group))

    @property
    def tile_window(self) -> int:
        """Window rows a row tile."""
        return math.ceil(self.rows / self.tiles)

    @property
    def stored(self) -> int:
        """Rows of a row tile in memory: the used ones, up to whole swizzle atoms of eight."""
        return math.ceil(self.tile_window * self.group / 8) * 8

    def shape(self, batch: int, head_dim: int) -> tuple[int, int, int, int, int]:
        """That of the packed queries of a batch."""
        return batch, self.heads, self.tiles, self.stored, head_dim

    def packed(self, q_BWHd: Float[Array, "B W H d"]) -> Float[Array, "B K T stored d"]:
        """Queries packed; the rows that fill up a tile, which may hold anything, are zeros."""
        batch, rows, _, head_dim = q_BWHd.shape
        q = jnp.pad(q_BWHd, ((0, 0), (0, self.tiles * self.tile_window - rows), (0, 0), (0, 0)))
        q = q.reshape(batch, self.tiles, self.tile_window, self.heads, self.group, head_dim)
        q = q.transpose(0, 3, 1, 2, 4, 5)
        q = q.reshape(batch, self.heads, self.tiles, self.tile_window * self.group, head_dim)
        return jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, self.stored - q.shape[3]), (0, 0)))
