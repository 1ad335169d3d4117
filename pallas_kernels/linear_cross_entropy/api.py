"""Row losses of ``hidden @ head`` a few rows at a time: no ``[rows, vocabulary]`` array is ever held.

The gradient is made in the forward pass, while the logits of a chunk are there: three products a row in all, where a
backward pass that computes the logits again has four. That works because a training loss is linear in the losses of
its rows; its backward pass only scales what the forward pass made. The idea is Liger Kernel's (arXiv 2410.10989).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES, SOFT_LOSSES, RowFunction
from pallas_kernels.linear_cross_entropy.xla import LOSSES, Rows, Vocabulary, loss_and_gradient, most_rows, product


def linear_cross_entropy(
    loss: str,
    hidden_BRD: Float[Array, "B R D"],
    head_VD: Float[Array, "V D"],
    targets_BR: Int[Array, "B R"],
    weights_KBR: Float[Array, "K B R"],
    teacher_BRD: Float[Array, "B R D"] | None = None,
) -> tuple[Float[Array, " K"], Float[Array, "B R"]]:
    """``reference.linear_cross_entropy``: weighted sums of row losses, and the row losses without a gradient.

    Products are in the dtype of ``hidden``, their sums, the softmax and the losses in float32. The gradient reaches
    ``hidden`` and, if it is differentiated, ``head``, which sums over rows in float32 and is returned in the head's
    dtype. Weights and teacher are constants. On a mesh (Explicit axes) every device does its own rows and, where the
    head is split by vocabulary, its own part of the vocabulary.

    Raises ValueError for an unknown loss, and for a teacher that is missing or has no use.
    """
    if loss not in ROW_LOSSES:
        raise ValueError(f"unknown loss '{loss}' (one of {', '.join(ROW_LOSSES)})")
    if (teacher_BRD is not None) != (loss in SOFT_LOSSES):
        raise ValueError(f"loss '{loss}' takes {'a' if loss in SOFT_LOSSES else 'no'} teacher")
    sums_K, losses_BR = _linear_cross_entropy(loss, hidden_BRD, head_VD, targets_BR, weights_KBR, teacher_BRD)
    return sums_K, jax.lax.stop_gradient(losses_BR)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_cross_entropy(
    loss: str, hidden: Array, head: Array, targets: Array, weights: Array, teacher: Array | None
) -> tuple[Array, Array]:
    losses_BR = _on_shards(loss, False, hidden, head, targets, None, teacher).losses
    return _weighted_sums(weights, losses_BR), losses_BR


def _forward(
    loss: str, hidden: Any, head: Any, targets: Any, weights: Any, teacher: Any
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    weights_KBR = weights.value
    # Every set of weights is scaled to at most 1: the rows of a mean then weigh 0 or 1, which rounds nothing.
    largest_K = jnp.max(jnp.abs(weights_KBR), axis=(1, 2))
    scale_K = jnp.where(largest_K > 0, largest_K, 1.0)
    scaled_KBR = weights_KBR / scale_K[:, None, None] if head.perturbed else None
    teacher_BRD = None if teacher is None else teacher.value
    rows = _on_shards(loss, True, hidden.value, head.value, targets.value, scaled_KBR, teacher_BRD)
    d_head_VKD = None if rows.d_head is None else rows.d_head.astype(head.value.dtype)
    sums_K = _weighted_sums(weights_KBR, rows.losses)
    return (sums_K, rows.losses), (weights_KBR, scale_K, rows.d_hidden, d_head_VKD)


def _backward(loss: str, residuals: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[Array | None, ...]:
    weights_KBR, scale_K, d_hidden_BRD, d_head_VKD = residuals
    d_sums_K = cotangents[0]
    if isinstance(d_sums_K, SymbolicZero):
        return (None,) * 5
    d_losses_BR = jnp.sum(d_sums_K[:, None, None] * weights_KBR, axis=0)
    d_hidden = (d_losses_BR[..., None] * d_hidden_BRD).astype(d_hidden_BRD.dtype)
    if d_head_VKD is None:
        return d_hidden, None, None, None, None
    d_head = jnp.sum((d_sums_K * scale_K)[:, None] * d_head_VKD, axis=1).astype(d_head_VKD.dtype)
    return d_hidden, d_head, None, None, None


_linear_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _weighted_sums(weights_KBR: Array, losses_BR: Array) -> Float[Array, " K"]:
    return jnp.sum(weights_KBR * losses_BR, axis=(1, 2))


def _on_shards(
    loss: str, with_gradient: bool, hidden: Array, head: Array, targets: Array, weights: Array | None, teacher: Any
) -> Rows:
    """``loss_and_gradient`` of the rows and the part of the vocabulary that each device has."""
    head = head.astype(hidden.dtype)
    mesh = jax.typeof(hidden).sharding.mesh
    if mesh.empty:
        return _of_shard(loss, with_gradient, (), (), (), hidden, head, targets, weights, teacher)
    rows: PartitionSpec = jax.typeof(hidden).sharding.spec
    vocabulary, width = jax.typeof(head).sharding.spec
    row_axes = _names(rows[0]) + _names(rows[1])
    # Devices with different rows need all of the head: it is gathered here once, not once a chunk, and its gradient
    # is split again where it is summed.
    local = vocabulary if set(_names(vocabulary)).isdisjoint(row_axes) else None
    scattered = width if set(_names(width)) <= set(row_axes) else None
    head = jax.sharding.reshard(head, PartitionSpec(local, None))
    out_specs = (PartitionSpec(*rows[:2]), rows if with_gradient else None, None)
    if weights is not None:
        out_specs = (*out_specs[:2], PartitionSpec(local, None, scattered))
    run = partial(_of_shard, loss, with_gradient, _names(local), row_axes, _names(scattered))
    run = jax.shard_map(run, out_specs=Rows(*out_specs), check_vma=False)  # pyrefly: ignore[bad-argument-type]
    results = run(hidden, head, targets, weights, teacher)
    if results.d_head is None:
        return results
    return results._replace(d_head=jax.sharding.reshard(results.d_head, PartitionSpec(vocabulary, None, width)))


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes that one dimension is split over."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _of_shard(
    loss: str,
    with_gradient: bool,
    vocabulary_axes: tuple[str, ...],
    row_axes: tuple[str, ...],
    width_axes: tuple[str, ...],
    hidden_BRD: Array,
    head_VD: Array,
    targets_BR: Array,
    weights_KBR: Array | None,
    teacher_BRD: Array | None,
) -> Rows:
    """Rows of all sequences in one line, so that chunks are full; gradients of the head summed over devices."""
    shape, width = targets_BR.shape, hidden_BRD.shape[-1]
    rows = loss_and_gradient(
        LOSSES[loss],
        with_gradient,
        Vocabulary(vocabulary_axes, head_VD.shape[0]),
        hidden_BRD.reshape(-1, width),
        head_VD,
        targets_BR.reshape(-1),
        None if weights_KBR is None else weights_KBR.reshape(len(weights_KBR), -1).T,
        None if teacher_BRD is None else teacher_BRD.reshape(-1, width),
    )
    d_head = rows.d_head
    if d_head is not None and width_axes:
        d_head = jax.lax.psum_scatter(d_head, width_axes, scatter_dimension=2, tiled=True)
    others = tuple(axis for axis in row_axes if axis not in width_axes)
    if d_head is not None and others:
        d_head = jax.lax.psum(d_head, others)
    d_hidden = None if rows.d_hidden is None else rows.d_hidden.reshape(hidden_BRD.shape)
    return Rows(rows.losses.reshape(shape), d_hidden, d_head)


def map_rows(
    function: RowFunction,
    hidden_BRD: Float[Array, "B R D"],
    head_VD: Float[Array, "V D"],
    targets_BR: Int[Array, "B R"],
    teacher_BRD: Float[Array, "B R D"] | None = None,
) -> Any:
    """``function`` of the float32 logits of every row (and of its teacher's), for measurements: no gradient is meant.

    Its results are pytrees of [B, R] arrays. Each sequence is cut into chunks, so that batch and vocabulary may be
    split over a mesh without a word about it in ``function``.
    """
    batch, rows, _ = hidden_BRD.shape
    # As many rows as a part of a soft loss has: ``function`` may make a few arrays of its own.
    sharding = jax.typeof(hidden_BRD).sharding
    local = batch if sharding.mesh.empty else sharding.shard_shape(hidden_BRD.shape)[0]
    chunk = min(rows, max(1, most_rows(head_VD.shape[0], 2) // local))
    chunks = -(-rows // chunk)
    head_VD = head_VD.astype(hidden_BRD.dtype)

    def cut(array: Array | None) -> Array | None:
        if array is None:
            return None
        padded = jnp.pad(array, [(0, 0), (0, chunks * chunk - rows)] + [(0, 0)] * (array.ndim - 2))
        return padded.reshape(batch, chunks, chunk, *array.shape[2:]).swapaxes(0, 1)

    def of_chunk(part: tuple[Array, Array | None, Array]) -> Any:
        hidden, teacher, targets = part
        soft = None if teacher is None else product("bcd,vd->bcv", teacher, head_VD)
        return function(product("bcd,vd->bcv", hidden, head_VD), soft, targets)

    results = jax.lax.map(of_chunk, jax.tree.map(cut, (hidden_BRD, teacher_BRD, targets_BR)))
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :rows], results)
