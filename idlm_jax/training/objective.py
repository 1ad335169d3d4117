"""What a step minimises: CE_noisy (or a soft loss) + α · CE_clean over two streams (method.md 2.4, design.md 6)."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.training.groups import Batch, GroupPolicy, NoisyRows, draw_groups
from idlm_jax.training.two_stream import clean_stream, two_streams
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.reference import SOFT_LOSSES

# ar: next-token loss alone. full: all weights, both streams. lora: an adapter on both streams (official). gated-lora:
# an adapter on the noisy stream only, so that the clean stream is the frozen base model.
MODES = ("ar", "full", "lora", "gated-lora")
# Which rows carry the noisy loss: those whose own token is masked (official), or also the prompt's last row, which
# predicts the first token of the answer (NeMo; method.md 2.4).
NOISY_TARGETS = ("masked", "answer")
# Guards the ratio of auto-balance (method.md 2.4).
_BALANCE_EPSILON = 1e-8


@dataclass(frozen=True)
class Objective:
    """The loss of one stage of training; static, one compiled program each."""

    mode: str
    groups: GroupPolicy
    # "ce", or against the clean row's own distribution "kl" or "tv".
    noisy_loss: str = "ce"
    # α, or None for auto-balance: CE_noisy / CE_clean, detached. Unused in gated-lora and ar.
    clean_weight: float | None = 0.2
    # True: every document counts the same, its noisy rows summed and divided by its number of learnt tokens (the
    # official code, with aligned starts). False: every row counts the same.
    by_document: bool = False
    noisy_targets: str = "masked"
    # Learn every token, prompts too, instead of those of the loss mask.
    learn_prompts: bool = False
    attention: str = "auto"

    @property
    def has_clean_loss(self) -> bool:
        """Whether the clean stream is trained."""
        return self.mode != "gated-lora"


class Losses(NamedTuple):
    """The parts of a loss, for the log; sums are over the whole batch."""

    total: Float[Array, ""]
    noisy: Float[Array, ""]
    clean: Float[Array, ""]
    # Mean noisy loss of the rows at each depth of their group.
    noisy_by_depth: Float[Array, " block"]
    # Rows with loss in either stream, and aligned groups that were left out.
    noisy_rows: Int[Array, ""]
    clean_rows: Int[Array, ""]
    left_out: Int[Array, ""]


def training_loss(
    model: Qwen3, batch: Batch, objective: Objective, key: Array, head_VD: Float[Array, "V D"] | None = None
) -> Losses:
    """The loss of a batch. ``key`` draws random group starts.

    ``head_VD`` is the output head to take gradients of (default: the model's own); a float32 one sums its gradient in
    float32. Losses are float32, in nats (total variation: a probability).
    """
    head = model.head() if head_VD is None else head_VD
    if objective.learn_prompts:
        batch = replace(batch, loss_mask=batch.segment_ids > 0)
    if objective.mode == "ar":
        (clean_hidden,), _ = model.streams([clean_stream(batch, None, objective.attention)], None)
        clean, _ = _clean_loss(clean_hidden, head, batch, objective)
        nothing = jnp.int32(0)
        return Losses(clean, jnp.float32(0), clean, jnp.zeros(0), nothing, jnp.sum(batch.clean_targets), nothing)

    mask_token_id = model.config.mask_token_id
    assert mask_token_id is not None
    noisy_rows = draw_groups(batch, objective.groups, mask_token_id, key)
    clean_hidden, noisy_hidden = two_streams(
        model,
        batch,
        noisy_rows,
        objective.groups.block_size,
        0 if objective.mode == "lora" else None,
        None if objective.mode == "full" else 0,
        objective.attention,
    )
    noisy_weights, first_weights = _noisy_weights(batch, noisy_rows, objective)
    noisy, row_losses = _noisy_loss(noisy_hidden, noisy_rows, noisy_weights, objective, clean_hidden, head)
    total, clean, clean_rows = noisy, jnp.float32(0), jnp.int32(0)
    if objective.has_clean_loss:
        # The prompt's last row sees the same in both streams, so its noisy loss is its clean one.
        clean, of_first_rows = _clean_loss(clean_hidden, head, batch, objective, first_weights)
        clean_rows = jnp.sum(batch.clean_targets)
        noisy += of_first_rows
        balance = jax.lax.stop_gradient(noisy) / (jax.lax.stop_gradient(clean) + _BALANCE_EPSILON)
        total = noisy + (balance if objective.clean_weight is None else objective.clean_weight) * clean
    return Losses(
        total,
        noisy,
        clean,
        mean_by_depth(row_losses, noisy_rows, objective.groups.block_size),
        jnp.sum(noisy_rows.is_target),
        clean_rows,
        jnp.sum(noisy_rows.left_out),
    )


def _noisy_loss(
    hidden: Float[Array, "B R D"],
    rows: NoisyRows,
    weights: Float[Array, "B R"],
    objective: Objective,
    clean_hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
) -> tuple[Float[Array, ""], Float[Array, "B R"]]:
    """The weighted loss of the noisy rows, and the loss of each of them, whether or not it counts."""
    teacher = None
    if objective.noisy_loss in SOFT_LOSSES:
        teacher = jnp.take_along_axis(clean_hidden, rows.clean_row[:, :, None], axis=1)
    sums, losses = linear_cross_entropy(objective.noisy_loss, hidden, head, rows.targets, weights[None], teacher)
    return sums[0], losses


def _clean_loss(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    batch: Batch,
    objective: Objective,
    first_weights: Float[Array, "B L"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted loss of the clean rows, and its part that counts as noisy loss."""
    weights = _clean_weights(batch, objective)
    if first_weights is None:
        return linear_cross_entropy("ce", hidden, head, batch.next_tokens, weights[None])[0][0], jnp.float32(0)
    clean, noisy = linear_cross_entropy("ce", hidden, head, batch.next_tokens, jnp.stack([weights, first_weights]))[0]
    return clean, noisy


def mean_by_depth(values_BR: Float[Array, "B R"], rows: NoisyRows, block_size: int) -> Float[Array, " block"]:
    """The mean of a number a row, over the rows that carry loss, by their place in the group."""
    shape = (values_BR.shape[0], -1, block_size)
    weight = rows.is_target.reshape(shape).astype(jnp.float32)
    return jnp.sum(weight * values_BR.reshape(shape), axis=(0, 1)) / jnp.maximum(jnp.sum(weight, axis=(0, 1)), 1)


def _clean_weights(batch: Batch, objective: Objective) -> Float[Array, "B L"]:
    targets = batch.clean_targets.astype(jnp.float32)
    if not objective.by_document:
        return targets / jnp.maximum(jnp.sum(targets), 1)
    return targets / jnp.maximum(_document_sum(batch, targets), 1) / _documents(batch)


def _noisy_weights(
    batch: Batch, rows: NoisyRows, objective: Objective
) -> tuple[Float[Array, "B R"], Float[Array, "B L"] | None]:
    """Weights of the noisy rows, and of clean rows that count as noisy ones, if any do."""
    targets = rows.is_target.astype(jnp.float32)
    firsts = None
    if objective.noisy_targets == "answer" and objective.has_clean_loss:
        firsts = (batch.clean_targets & ~batch.loss_mask).astype(jnp.float32)
    if not objective.by_document:
        count = jnp.maximum(jnp.sum(targets) + (0 if firsts is None else jnp.sum(firsts)), 1)
        return targets / count, None if firsts is None else firsts / count
    weight = 1 / jnp.maximum(_document_sum(batch, batch.loss_mask.astype(jnp.float32)), 1) / _documents(batch)
    targets *= jnp.take_along_axis(weight, rows.clean_row, axis=1)
    return targets, None if firsts is None else firsts * weight


def _documents(batch: Batch) -> Float[Array, ""]:
    """Number of documents that have anything to learn."""
    first = (batch.positions == 0) & (batch.segment_ids > 0)
    learnt = _document_sum(batch, batch.clean_targets.astype(jnp.float32)) > 0
    return jnp.maximum(jnp.sum(first & learnt), 1).astype(jnp.float32)


def _document_sum(batch: Batch, values: Float[Array, "B L"]) -> Float[Array, "B L"]:
    """For every token the sum of ``values`` over its document (whole numbers below 2²⁴, so float32 is exact)."""
    length = values.shape[1]
    index = batch.index
    last = jax.lax.cummin(jnp.where(batch.continues, length, index), axis=1, reverse=True)
    running = jnp.cumsum(values, axis=1)
    before = jnp.take_along_axis(running - values, index - batch.positions, axis=1)
    return jnp.take_along_axis(running, last, axis=1) - before
