"""Mask groups: where the noisy rows of a training step stand, what they see, and what they must predict (design.md 6).

A group is a run of ``block_size`` rows that replace the tokens at indices s, s + 1, … of a packed row. They see the
tokens of their document before s and, causally, each other; row j predicts the token at s + j + 1. That is what the
decoder's mask rows see, and with starts at every multiple of the block size it is the official ``x_t`` (method.md 2).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from idlm_jax.backbone.layers import split_axes

STARTS = ("aligned", "random")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed rows of tokens, as ``data.pipeline`` makes them."""

    # 0 where there is no document.
    tokens: Int[Array, "B L"]
    # 1, 2, … for the documents of a row; 0 where there is none.
    segment_ids: Int[Array, "B L"]
    # From 0 inside each document.
    positions: Int[Array, "B L"]
    # True for tokens that are learnt (an assistant's).
    loss_mask: Bool[Array, "B L"]

    @classmethod
    def from_dict(cls, arrays: Mapping[str, Array]) -> "Batch":
        """From an element of the data pipeline."""
        return cls(arrays["tokens"], arrays["segment_ids"], arrays["positions"], arrays["loss_mask"])

    @property
    def index(self) -> Int[Array, "B L"]:
        """0, 1, … in every row (a sum, so that it is split over devices like the tokens)."""
        return jnp.arange(self.tokens.shape[1]) + jnp.zeros_like(self.tokens)

    @property
    def continues(self) -> Bool[Array, "B L"]:
        """Whether the next token belongs to the same document."""
        same = (self.segment_ids[:, 1:] == self.segment_ids[:, :-1]) & (self.segment_ids[:, 1:] > 0)
        return jnp.pad(same, ((0, 0), (0, 1)))

    @property
    def next_tokens(self) -> Int[Array, "B L"]:
        """The token each clean row predicts; meaningless where ``continues`` is False."""
        return jnp.pad(self.tokens[:, 1:], ((0, 0), (0, 1)))

    @property
    def clean_targets(self) -> Bool[Array, "B L"]:
        """Rows whose next token is learnt."""
        return self.continues & jnp.pad(self.loss_mask[:, 1:], ((0, 0), (0, 1)))


@dataclass(frozen=True)
class GroupPolicy:
    """How the mask groups of a step are chosen."""

    # B, the number of mask rows of a group; trains strides up to B + 1.
    block_size: int
    # "aligned": at multiples of the block size from the start of each document, as the official code has them.
    # "random": anywhere in the learnt text, drawn anew at each step.
    starts: str = "random"
    # Noisy rows a clean token: at most for random starts, at least for aligned ones, so that with 1 all blocks of one
    # document fit. Aligned blocks that do not fit are left out and counted.
    density: float = 1.0

    def groups(self, length: int) -> int:
        """Groups a row of ``length`` tokens: for a multiple of 8 noisy rows, as the hardware's tiles have them.

        Never fewer than one such multiple has, even where that is more than the density.
        """
        rows, step = int(self.density * length), math.lcm(8, self.block_size)
        steps = rows // step if self.starts == "random" else -(-rows // step)
        return min(length, max(1, steps) * step // self.block_size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoisyRows:
    """The rows of all mask groups of a batch, R = G · block_size of them, group after group."""

    tokens: Int[Array, "B R"]
    positions: Int[Array, "B R"]
    # Every row sees the clean tokens ``key_start … key_end - 1`` (none for a group that is not there).
    key_start: Int[Array, "B R"]
    key_end: Int[Array, "B R"]
    # The clean row that predicts the same token, and that token.
    clean_row: Int[Array, "B R"]
    targets: Int[Array, "B R"]
    # Whether the row carries loss.
    is_target: Bool[Array, "B R"]
    # Aligned groups that did not fit, a row of the batch.
    left_out: Int[Array, " B"]


def draw_groups(batch: Batch, policy: GroupPolicy, mask_token_id: int, key: Array) -> NoisyRows:
    """Choose the groups of every row of a batch and lay out their rows.

    ``key`` matters for random starts only: starts are then drawn without replacement among the tokens that the decoder
    could draft from, that is learnt tokens that follow another token and are followed by a learnt one.
    """
    length = batch.tokens.shape[1]
    carries_loss = batch.loss_mask & batch.clean_targets
    if policy.starts == "random":
        axes = split_axes(batch.tokens)
        order = jax.random.uniform(key, batch.tokens.shape, out_sharding=None if axes is None else PartitionSpec(*axes))
        eligible = carries_loss & (batch.positions > 0)
    else:
        order = 1.0 - (batch.index + 1) / (length + 1)
        eligible = carries_loss & _first_of_block(batch, policy.block_size)
    best, start_BG = jax.lax.top_k(jnp.where(eligible, order, -1.0), policy.groups(length))
    # In the order of the text, absent groups last: neighbouring rows then see nearly the same keys.
    start_BG = jnp.sort(jnp.where(best >= 0, start_BG, length), axis=1)
    left_out = jnp.sum(eligible, axis=1) - jnp.sum(best >= 0, axis=1)
    left_out = left_out if policy.starts == "aligned" else jnp.zeros_like(left_out)
    return _lay_out(batch, policy, start_BG, carries_loss, mask_token_id, left_out)


def _first_of_block(batch: Batch, block_size: int) -> Bool[Array, "B L"]:
    """Learnt tokens that begin an aligned block, or the learnt part of one that begins in a prompt.

    The official code leaves prompt tokens of such a block as they are; they see what clean rows see and so are clean
    rows, and what is left is a shorter group.
    """
    after_prompt = ~jnp.pad(batch.loss_mask[:, :-1], ((0, 0), (1, 0)))
    return batch.loss_mask & ((batch.positions % block_size == 0) | after_prompt)


def _lay_out(
    batch: Batch,
    policy: GroupPolicy,
    start_BG: Int[Array, "B G"],
    carries_loss: Bool[Array, "B L"],
    mask_token_id: int,
    left_out: Int[Array, " B"],
) -> NoisyRows:
    size, length = policy.block_size, batch.tokens.shape[1]
    groups = (*start_BG.shape, size)
    # Flat, for what comes out of a reshape of one row has lost its split over devices (below, `&` gives it back).
    start = jnp.repeat(start_BG, size, axis=1)
    present = start < length
    start = jnp.where(present, start, 0)
    offset = jnp.arange(start.shape[1]) % size
    fits = present & (start + offset < length)
    index = jnp.minimum(start + offset, length - 1)

    def at(array: Array, where: Array) -> Array:
        return jnp.take_along_axis(array, where, axis=1)

    first_position = at(batch.positions, start)
    positions = first_position + offset
    in_group = fits & (at(batch.segment_ids, index) == at(batch.segment_ids, start))
    if policy.starts == "aligned":
        in_group &= positions // size == first_position // size
    # Behind a token that is not learnt (the next prompt) the decoder would not draft any more.
    exists = jnp.cumprod((in_group & at(batch.loss_mask, index)).reshape(groups), axis=2) > 0
    return NoisyRows(
        tokens=jnp.full_like(index, mask_token_id),
        positions=positions,
        key_start=start - first_position,
        key_end=start,
        clean_row=index,
        targets=at(batch.next_tokens, index),
        is_target=exists.reshape(index.shape) & at(carries_loss, index),
        left_out=left_out,
    )
