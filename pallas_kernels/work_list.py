"""The grid of a TPU kernel over the pairs of tiles that have work, and no others.

Which tiles of keys a tile of rows needs is known at run time only. A kernel therefore runs over a list of pairs, which
Pallas prefetches as scalars: its index maps read the list, so the tiles of the next pair are fetched while this one is
computed, also from one tile of rows to the next, and a pair that is not wanted costs nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Bits of ``WorkList.flags``: the pair is the first or last one of its major tile; it needs a mask.
FIRST, LAST, PARTIAL = 1, 2, 4


class WorkList(NamedTuple):
    """Pairs of tiles, grouped by their major one."""

    # Pairs that count; the rest of the lists is unused.
    count: Int[Array, ""]
    major: Int[Array, " pairs"]
    minor: Int[Array, " pairs"]
    flags: Int[Array, " pairs"]


def work_list(wanted_BMN: Bool[Array, "B M N"], partial_BMN: Bool[Array, "B M N"]) -> WorkList:
    """List the wanted pairs of B · M major and B · N minor tiles, which meet inside their batch row only.

    A major tile that wants nothing gets the pair with its first minor tile, so that its output is written at all; the
    mask of that pair must leave nothing.
    """
    _, majors, minors = wanted_BMN.shape
    idle = ~jnp.any(wanted_BMN, axis=2, keepdims=True)
    wanted = (wanted_BMN | (idle & (jnp.arange(minors) == 0))).reshape(-1)
    count = jnp.sum(wanted, dtype=jnp.int32)
    pair = jnp.argsort(~wanted, stable=True).astype(jnp.int32)
    major = pair // minors
    minor = major // majors * minors + pair % minors
    changes = major[1:] != major[:-1]
    first = jnp.pad(changes, (1, 0), constant_values=True)
    last = jnp.pad(changes, (0, 1)) | (jnp.arange(len(pair)) == count - 1)
    partial = (partial_BMN | idle).reshape(-1)[pair]
    return WorkList(count, major, minor, FIRST * first + LAST * last + PARTIAL * partial)
