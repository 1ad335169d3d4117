"""Losses of next-token distributions, row by row, from whole logits in plain jnp: the definitions and the oracle.

``ce`` against a token, ``kl`` and ``tv`` against the distribution of a teacher row (design.md 6).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits of one row (and of its teacher, or None) and its target -> a pytree of numbers a row.
RowFunction = Callable[[Float[Array, "*rows V"], Any, Int[Array, "*rows"]], Any]


def cross_entropy(logits: Float[Array, "*rows V"], teacher: None, target: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """-log q(target), in nats."""
    # A sum with one term rather than a gather: the vocabulary may be split over devices.
    is_target = jnp.arange(logits.shape[-1]) == target[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def kl_divergence(
    logits: Float[Array, "*rows V"], teacher: Float[Array, "*rows V"], target: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """KL(p ‖ q) in nats, p the teacher's distribution."""
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def total_variation(
    logits: Float[Array, "*rows V"], teacher: Float[Array, "*rows V"], target: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """½ Σ |p − q|, which is one minus the probability that a draft from q is accepted against p."""
    return 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(teacher) - jax.nn.softmax(logits)), axis=-1)


ROW_LOSSES: dict[str, RowFunction] = {"ce": cross_entropy, "kl": kl_divergence, "tv": total_variation}
# Those that need a teacher.
SOFT_LOSSES = ("kl", "tv")


def linear_cross_entropy(
    loss: str,
    hidden_BRD: Float[Array, "B R D"],
    head_VD: Float[Array, "V D"],
    targets_BR: Int[Array, "B R"],
    weights_KBR: Float[Array, "K B R"],
    teacher_BRD: Float[Array, "B R D"] | None = None,
) -> tuple[Float[Array, " K"], Float[Array, "B R"]]:
    """Sums of the row losses of ``hidden @ head.T``, one for each set of weights, and the row losses themselves.

    All logits are held at once. The teacher's come from the same head; neither they nor the row losses returned carry
    a gradient.
    """
    head = head_VD.astype(hidden_BRD.dtype)

    def logits(hidden: Array) -> Float[Array, "B R V"]:
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("brd,vd->brv", hidden, head, precision="highest", preferred_element_type=dtype)

    teacher = None if teacher_BRD is None else jax.lax.stop_gradient(logits(teacher_BRD))
    losses = ROW_LOSSES[loss](logits(hidden_BRD), teacher, targets_BR)
    return jnp.sum(weights_KBR * losses, axis=(1, 2)), jax.lax.stop_gradient(losses)
