"""What a step minimises: CE_noisy (or a soft loss) + α · CE_clean over two streams (method.md 2.4, design.md 6)."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.training.groups import Batch, GroupPolicy, NoisyRows, draw_groups
from idlm_jax.training.two_stream import clean_stream, noisy_stream
from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES, SOFT_LOSSES, RowFunction, map_rows

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
    # Rows of each sequence whose logits are held at a time.
    loss_chunk: int = 256
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
    clean_adapter_from = 0 if objective.mode == "lora" else None
    clean_hidden, states = clean_stream(model, batch, clean_adapter_from, objective.attention)
    clean, clean_rows, clean_losses = jnp.float32(0), jnp.int32(0), None
    if objective.has_clean_loss:
        clean_losses = _row_losses("ce", clean_hidden, head, batch.next_tokens, None, objective)
        clean = jnp.sum(_clean_weights(batch, objective) * clean_losses)
        clean_rows = jnp.sum(batch.clean_targets)
    if objective.mode == "ar":
        nothing = jnp.int32(0)
        return Losses(clean, jnp.float32(0), clean, jnp.zeros(0), nothing, clean_rows, nothing)

    noisy_rows, row_losses = noisy_losses(model, batch, objective, key, clean_hidden, states, head)
    noisy_weights, first_weights = _noisy_weights(batch, noisy_rows, objective)
    noisy = jnp.sum(noisy_weights * row_losses)
    if clean_losses is not None:
        # The prompt's last row sees the same in both streams, so its noisy loss is its clean one.
        noisy += jnp.sum(first_weights * clean_losses)
        balance = jax.lax.stop_gradient(noisy) / (jax.lax.stop_gradient(clean) + _BALANCE_EPSILON)
        total = noisy + (balance if objective.clean_weight is None else objective.clean_weight) * clean
    else:
        total = noisy
    return Losses(
        total,
        noisy,
        clean,
        mean_by_depth(row_losses, noisy_rows, objective.groups.block_size),
        jnp.sum(noisy_rows.is_target),
        clean_rows,
        jnp.sum(noisy_rows.left_out),
    )


def noisy_losses(
    model: Qwen3,
    batch: Batch,
    objective: Objective,
    key: Array,
    clean_hidden: Float[Array, "B L D"],
    states: tuple[Array, Array],
    head: Float[Array, "V D"],
) -> tuple[NoisyRows, Float[Array, "B R"]]:
    """The noisy rows of a batch and the loss of each of them, whether or not it counts."""
    mask_token_id = model.config.mask_token_id
    assert mask_token_id is not None
    noisy_rows = draw_groups(batch, objective.groups, mask_token_id, key)
    adapter_from = None if objective.mode == "full" else 0
    noisy_hidden = noisy_stream(
        model, noisy_rows, states, objective.groups.block_size, adapter_from, objective.attention
    )
    teacher = None
    if objective.noisy_loss in SOFT_LOSSES:
        teacher = jax.lax.stop_gradient(jnp.take_along_axis(clean_hidden, noisy_rows.clean_row[:, :, None], axis=1))
    return noisy_rows, _row_losses(objective.noisy_loss, noisy_hidden, head, noisy_rows.targets, teacher, objective)


def mean_by_depth(values_BR: Float[Array, "B R"], rows: NoisyRows, block_size: int) -> Float[Array, " block"]:
    """The mean of a number a row, over the rows that carry loss, by their place in the group."""
    shape = (values_BR.shape[0], -1, block_size)
    weight = rows.is_target.reshape(shape).astype(jnp.float32)
    return jnp.sum(weight * values_BR.reshape(shape), axis=(0, 1)) / jnp.maximum(jnp.sum(weight, axis=(0, 1)), 1)


def _row_losses(
    name: str, hidden: Array, head: Array, targets: Array, teacher: Array | None, objective: Objective
) -> Float[Array, "B R"]:
    function: RowFunction = ROW_LOSSES[name]
    return map_rows(function, hidden, head, targets, teacher, objective.loss_chunk)


def _clean_weights(batch: Batch, objective: Objective) -> Float[Array, "B L"]:
    targets = batch.clean_targets.astype(jnp.float32)
    if not objective.by_document:
        return targets / jnp.maximum(jnp.sum(targets), 1)
    return targets / jnp.maximum(_document_sum(batch, targets), 1) / _documents(batch)


def _noisy_weights(
    batch: Batch, rows: NoisyRows, objective: Objective
) -> tuple[Float[Array, "B R"], Float[Array, "B L"]]:
    """Weights of the noisy rows, and of clean rows that count as noisy ones."""
    targets = rows.is_target.astype(jnp.float32)
    also = objective.noisy_targets == "answer" and objective.has_clean_loss
    firsts = (batch.clean_targets & ~batch.loss_mask & also).astype(jnp.float32)
    if not objective.by_document:
        count = jnp.maximum(jnp.sum(targets) + jnp.sum(firsts), 1)
        return targets / count, firsts / count
    weight = 1 / jnp.maximum(_document_sum(batch, batch.loss_mask.astype(jnp.float32)), 1) / _documents(batch)
    return targets * jnp.take_along_axis(weight, rows.clean_row, axis=1), firsts * weight


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
