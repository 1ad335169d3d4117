"""Mask groups: where the noisy rows of a training step stand, what they see, and what they must predict (design.md 6).

A group is a run of ``block_size`` rows that replace the tokens at indices s, s + 1, … of a packed row. They see the
tokens of their document before s and, causally, each other; row j predicts the token at s + j + 1. That is what the
decoder's mask rows see, and with starts at every multiple of the block size it is the official ``x_t`` (method.md 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.backbone.layers import split_axes

STARTS = ("aligned", "random")
# Which rows carry the noisy loss; the first is the official code's, the second NeMo's (method.md 2.4).
NOISY_TARGETS = ("masked", "answer")


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
    # Noisy rows a clean token; aligned blocks that do not fit are left out and counted.
    density: float = 1.0
    # "masked": rows whose own token is masked and whose next token is learnt (official). "answer": every row whose next
    # token is learnt, so that the last prompt token's row also predicts the first token of the answer (NeMo).
    noisy_targets: str = "masked"

    def groups(self, length: int) -> int:
        """Groups a row of ``length`` tokens."""
        return max(1, min(length, -(-int(self.density * length) // self.block_size)))


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
    eligible, order = _eligible(batch, policy, key)
    count = policy.groups(batch.tokens.shape[1])
    score = jnp.where(eligible, order, -1.0)
    best, start_BG = jax.lax.top_k(score, count)
    # In the order of the text, absent groups last: neighbouring rows then see nearly the same keys.
    start_BG = jnp.sort(jnp.where(best >= 0, start_BG, batch.tokens.shape[1]), axis=1)
    left_out = jnp.sum(eligible, axis=1) - jnp.sum(best >= 0, axis=1)
    left_out = left_out if policy.starts == "aligned" else jnp.zeros_like(left_out)
    return _lay_out(batch, policy, start_BG, mask_token_id, left_out)


def _eligible(batch: Batch, policy: GroupPolicy, key: Array) -> tuple[Bool[Array, "B L"], Float[Array, "B L"]]:
    """Tokens at which a group may start, and the order (largest first) in which starts are taken, in [0, 1)."""
    length = batch.tokens.shape[1]
    if policy.starts == "random":
        axes = split_axes(batch.tokens)
        order = jax.random.uniform(
            key, batch.tokens.shape, out_sharding=None if axes is None else jax.sharding.PartitionSpec(*axes)
        )
        return batch.loss_mask & batch.clean_targets & (batch.positions > 0), order
    order = 1.0 - (batch.index + 1) / (length + 1)
    carries_loss = _carries_loss(batch, policy)
    any_row = jnp.zeros_like(carries_loss)
    for j in range(policy.block_size):
        ahead = jnp.pad(carries_loss[:, j:], ((0, 0), (0, j)))
        same = jnp.pad(batch.segment_ids[:, j:], ((0, 0), (0, j))) == batch.segment_ids
        any_row |= ahead & same
    starts_block = (batch.positions % policy.block_size == 0) & (batch.segment_ids > 0)
    return starts_block & any_row, order


def _carries_loss(batch: Batch, policy: GroupPolicy) -> Bool[Array, "B L"]:
    return batch.clean_targets & (batch.loss_mask if policy.noisy_targets == "masked" else True)


def _lay_out(
    batch: Batch, policy: GroupPolicy, start_BG: Int[Array, "B G"], mask_token_id: int, left_out: Int[Array, " B"]
) -> NoisyRows:
    rows, length = batch.tokens.shape
    shape = (rows, start_BG.shape[1] * policy.block_size)
    present = start_BG < length
    # (group, row of the group), then flattened to R.
    index = (start_BG[:, :, None] + jnp.arange(policy.block_size)).reshape(shape)
    start = jnp.repeat(jnp.where(present, start_BG, 0), policy.block_size, axis=1)
    inside = jnp.minimum(index, length - 1)

    def at(array: Array, where: Array) -> Array:
        return jnp.take_along_axis(array, where, axis=1)

    first_position = at(batch.positions, start)
    exists = jnp.repeat(present, policy.block_size, axis=1) & (index < length)
    in_document = exists & (at(batch.segment_ids, inside) == at(batch.segment_ids, start))
    # In an aligned block on the border, prompt tokens stay as they are (method.md 2.2); random starts have no border.
    is_prompt = in_document & ~at(batch.loss_mask, inside)
    return NoisyRows(
        tokens=jnp.where(is_prompt, at(batch.tokens, inside), mask_token_id),
        positions=first_position + index - jnp.repeat(start_BG, policy.block_size, axis=1),
        key_start=start - first_position,
        key_end=start,
        clean_row=inside,
        targets=at(batch.next_tokens, inside),
        is_target=in_document & at(_carries_loss(batch, policy), inside),
        left_out=left_out,
    )
