"""Row losses of ``hidden @ head`` in plain jnp, a few rows at a time: no ``[rows, vocabulary]`` array is ever held.

The logits of a chunk of rows are computed, reduced to a few numbers a row, and forgotten; the backward pass computes
them again. Losses: ``ce`` against a token, ``kl`` and ``tv`` against the distribution of a teacher row (design.md 6).
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


@jax.custom_vjp
def head_logits(hidden: Float[Array, "*rows D"], head: Float[Array, "V D"]) -> Float[Array, "*rows V"]:
    """``hidden @ head.T`` in float32: products in the dtype of ``hidden``, sums in float32.

    Its gradients are products in that dtype too (JAX by itself would multiply the float32 cotangent in float32), and
    the head's gradient has the dtype of the head, so that a float32 head sums its chunks in float32.
    """
    return _product("bcd,vd->bcv", hidden, head.astype(hidden.dtype))


def _head_logits_forward(hidden: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return head_logits(hidden, head), (hidden, head)


def _head_logits_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, head = residuals
    cotangent = cotangent.astype(hidden.dtype)
    d_hidden = _product("bcv,vd->bcd", cotangent, head.astype(hidden.dtype), like=hidden)
    d_head = _product("bcv,bcd->vd", cotangent, hidden, like=head)
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype)


def _product(equation: str, x: Array, y: Array, like: Array | None = None) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sharding = None if like is None else jax.typeof(like).sharding
    return jnp.einsum(
        equation,
        x,
        y,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=None if sharding is None or sharding.mesh.empty else sharding.spec,
    )


head_logits.defvjp(_head_logits_forward, _head_logits_backward)


def map_rows(
    function: RowFunction,
    hidden_BRD: Float[Array, "B R D"],
    head_VD: Float[Array, "V D"],
    targets_BR: Int[Array, "B R"],
    teacher_BRD: Float[Array, "B R D"] | None = None,
    chunk: int = 256,
) -> Any:
    """``function`` of the logits of every row; its results are pytrees of [B, R] arrays.

    ``chunk`` rows of every sequence are done at a time; the backward pass computes their logits again. The teacher's
    logits come from the same head and carry no gradient.
    """
    batch, rows, _ = hidden_BRD.shape
    chunk = min(chunk, rows)
    chunks = -(-rows // chunk)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, chunks * chunk - rows)] + [(0, 0)] * (array.ndim - 2))
        return padded.reshape(batch, chunks, chunk, *array.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(hidden: Array, teacher: Array | None, targets: Array) -> Any:
        soft = None if teacher is None else jax.lax.stop_gradient(head_logits(teacher, head_VD))
        return function(head_logits(hidden, head_VD), soft, targets)

    parts = (cut(hidden_BRD), None if teacher_BRD is None else cut(teacher_BRD), cut(targets_BR))
    results = jax.lax.map(lambda part: of_chunk(*part), parts)
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :rows], results)
