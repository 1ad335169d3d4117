"""The decoding window: which rows a round feeds, where they stand, and what they see (design.md 7, method.md 3).

Rows 0 … N - 1 are *clean*: the pending token and its N - 1 drafts. Then come mask groups of N - 1 rows; group g is
anchored after clean row a_g: its masks take the positions that follow that row and see the cache, the clean rows up to
a_g, and their own group causally. Row numbers never change, so the LoRA gate is static; only anchors vary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The rows of one forward pass."""

    tokens: Int[Array, "B W"]
    # Rotary positions; the slot of row r in the cache is length + r whatever its position.
    positions: Int[Array, "B W"]
    # (row, key) inside the window; the committed cache before it is visible to every row.
    mask: Bool[Array, "B W W"]


class Layout(Protocol):
    """Where the mask groups of a window are anchored, and which of them survives verification."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def groups(self, stride: int) -> int:
        """Number of mask groups."""
        ...

    def anchors(self, warm_B: Bool[Array, " B"], stride: int) -> Int[Array, "B G"]:
        """Clean row after which each group is anchored; ``warm`` requests have drafts to verify."""
        ...

    def surviving_group(self, accepted_B: Int[Array, " B"]) -> Int[Array, " B"]:
        """The group whose drafts may follow ``accepted`` drafts and the next token."""
        ...

    def next_warm(self, warm_B: Bool[Array, " B"], accepted_B: Int[Array, " B"], stride: int) -> Bool[Array, " B"]:
        """Whether that group's drafts stand at the right place, so that the next round can verify them."""
        ...

    def tokens_per_forward(self, prefix: Sequence[float]) -> float:
        """TPF of a stride, from P_k, the chance that the first k drafts are all accepted, k = 1 … N - 1."""
        ...


@dataclass(frozen=True)
class StandardLayout:
    """The paper's: one group after the last clean row, W = 2N - 1; a rejection makes the next round cold."""

    name: str = "standard"

    def groups(self, stride: int) -> int:
        """One group."""
        return 1

    def anchors(self, warm_B: Bool[Array, " B"], stride: int) -> Int[Array, "B G"]:
        """After the last draft, or in a cold round after the pending token."""
        return jnp.where(warm_B, stride - 1, 0)[:, None]

    def surviving_group(self, accepted_B: Int[Array, " B"]) -> Int[Array, " B"]:
        """The only one."""
        return jnp.zeros_like(accepted_B)

    def next_warm(self, warm_B: Bool[Array, " B"], accepted_B: Int[Array, " B"], stride: int) -> Bool[Array, " B"]:
        """After a cold round, or when every draft was accepted."""
        return ~warm_B | (accepted_B == stride - 1)

    def tokens_per_forward(self, prefix: Sequence[float]) -> float:
        """Cold rounds emit one token, and every rejection costs one (method.md 6.2)."""
        return (2 + sum(prefix[:-1])) / (2 - prefix[-1]) if prefix else 1.0


@dataclass(frozen=True)
class BranchLayout:
    """A group after every clean row, W = N²: whatever verification decides, the right drafts exist."""

    name: str = "branch"

    def groups(self, stride: int) -> int:
        """One group a clean row."""
        return stride

    def anchors(self, warm_B: Bool[Array, " B"], stride: int) -> Int[Array, "B G"]:
        """Group g after clean row g."""
        return jnp.broadcast_to(jnp.arange(stride), (warm_B.shape[0], stride))

    def surviving_group(self, accepted_B: Int[Array, " B"]) -> Int[Array, " B"]:
        """The group anchored after the last accepted draft."""
        return accepted_B

    def next_warm(self, warm_B: Bool[Array, " B"], accepted_B: Int[Array, " B"], stride: int) -> Bool[Array, " B"]:
        """Always."""
        return jnp.ones_like(warm_B)

    def tokens_per_forward(self, prefix: Sequence[float]) -> float:
        """No round is cold (design.md 7)."""
        return 1 + sum(prefix)


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (StandardLayout(), BranchLayout())}


def window_rows(layout: Layout, stride: int) -> int:
    """W: N clean rows and the mask groups."""
    return stride + layout.groups(stride) * (stride - 1)


def build_window(
    layout: Layout,
    stride: int,
    mask_token_id: int,
    length_B: Int[Array, " B"],
    pending_B: Int[Array, " B"],
    drafts: Int[Array, "B drafts"],
    warm_B: Bool[Array, " B"],
) -> Window:
    """The window of one round over a cache of ``length_B`` committed tokens.

    In a cold round the draft rows hold stale tokens; no surviving row sees them.
    """
    batch = pending_B.shape[0]
    anchors_BG = layout.anchors(warm_B, stride)
    groups, depth = anchors_BG.shape[1], stride - 1
    masks = jnp.full((batch, groups * depth), mask_token_id, jnp.int32)
    tokens = jnp.concatenate([pending_B[:, None], drafts, masks], axis=1)

    # Per row: its group (-1 for clean rows), its number inside clean rows or group, and the last clean row it sees.
    group_W = jnp.concatenate([jnp.full(stride, -1), jnp.repeat(jnp.arange(groups), depth)])
    number_W = jnp.concatenate([jnp.arange(stride), jnp.tile(jnp.arange(depth), groups)])
    clean_BN = jnp.broadcast_to(jnp.arange(stride), (batch, stride))
    last_seen_BW = jnp.concatenate([clean_BN, jnp.repeat(anchors_BG, depth, axis=1)], axis=1)

    is_clean_W = group_W < 0
    offset_BW = jnp.where(is_clean_W, number_W, last_seen_BW + 1 + number_W)
    sees_clean = is_clean_W[None, None, :] & (number_W[None, None, :] <= last_seen_BW[:, :, None])
    same_group = (group_W[:, None] == group_W[None, :]) & ~is_clean_W[None, :]
    sees_group = same_group & (number_W[None, :] <= number_W[:, None])
    return Window(tokens, length_B[:, None] + offset_BW, sees_clean | sees_group[None])
