"""Losses of the rows of one device and their gradients, in one pass over chunks of rows; plain XLA, on GPU and TPU.

What a row costs besides its products is the traffic of its logits: float32 written by the product, read once for the
normaliser, (for ``kl`` and ``tv``) once for the loss, and once for the gradient, which is written in the dtype of the
products and read by them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Bytes that may be held besides arguments and results: a third for logits, the rest for their gradients.
SCRATCH_BYTES = 10**9
# Rows of a product are a multiple of this, where there are so many.
_TILE = 64


class Rows(NamedTuple):
    """What is known of rows after one pass over them."""

    losses: Array
    # Gradients of each row's own loss.
    d_hidden: Array | None
    # [V, K, D]: gradients of the weighted sums over all rows.
    d_head: Array | None


class Vocabulary(NamedTuple):
    """The part of the vocabulary that a device has, and the mesh axes over which the rest lies."""

    axes: tuple[str, ...]
    size: int

    def total(self, values: Float[Array, "c V"]) -> Float[Array, "c 1"]:
        """The sum over the whole vocabulary."""
        part = jnp.sum(values, axis=-1, keepdims=True)
        return jax.lax.psum(part, self.axes) if self.axes else part

    def local(self, targets: Int[Array, " c"]) -> Int[Array, " c"]:
        """Places of targets in this part; those outside of it are elsewhere."""
        return targets - jax.lax.axis_index(self.axes) * self.size if self.axes else targets

    def normaliser(self, logits: Float[Array, "c V"]) -> tuple[Float[Array, "c 1"], Float[Array, "c 1"]]:
        """The largest logit, and log Σ exp of what the others are below it, by one pass over this part."""
        lowest = jnp.finfo(jnp.float32).min
        ones = jnp.ones_like(logits)
        largest, total = jax.lax.reduce((logits, ones), (lowest, jnp.float32(0)), _add_exponentials, (1,))
        if self.axes:
            everywhere = jax.lax.pmax(largest, self.axes)
            total = jax.lax.psum(total * jnp.exp(largest - everywhere), self.axes)
            largest = everywhere
        return largest[:, None], jnp.log(total)[:, None]


def _add_exponentials(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Sums of exponentials, each as the largest exponent and the sum divided by its exponential."""
    (x_largest, x_total), (y_largest, y_total) = x, y
    difference = x_largest - y_largest
    smaller = jnp.exp(-jnp.abs(difference))
    total = jnp.where(difference > 0, x_total + y_total * smaller, x_total * smaller + y_total)
    return jnp.maximum(x_largest, y_largest), total


class Distribution(NamedTuple):
    """Of some rows over the vocabulary: the logits of this part of it, and what normalises them."""

    logits: Float[Array, "c V"]
    largest: Float[Array, "c 1"]
    log_total: Float[Array, "c 1"]

    def log(self, logits: Array) -> Array:
        """Log probabilities of logits, of all or of some."""
        # Not less the sum of the two: what is near the largest logit would lose its last bits.
        return (logits - self.largest) - self.log_total

    @property
    def probabilities(self) -> Float[Array, "c V"]:
        """Of this part of the vocabulary."""
        return jnp.exp(self.log(self.logits))

    def rows(self, begin: int, end: int) -> "Distribution":
        """Some of the rows."""
        return Distribution(*(array[begin:end] for array in self))


class _Loss(NamedTuple):
    """A loss of rows of q against those of p (None without a teacher) or targets, in two readings of the logits."""

    # -> the losses and what the gradient needs of them.
    of_rows: Callable[[Vocabulary, Distribution, Any, Array], tuple[Float[Array, "c 1"], Array | None]]
    # -> the gradients of the losses for the logits of q.
    gradient: Callable[[Vocabulary, Distribution, Any, Array, Any], Float[Array, "c V"]]


def _cross_entropy(
    vocabulary: Vocabulary, q: Distribution, p: None, targets: Int[Array, " c"]
) -> tuple[Float[Array, "c 1"], None]:
    at = vocabulary.local(targets)[:, None]
    here = (at >= 0) & (at < vocabulary.size)
    log_q_target = q.log(jnp.take_along_axis(q.logits, jnp.where(here, at, 0), axis=1))
    return -vocabulary.total(jnp.where(here, log_q_target, 0.0)), None


def _d_cross_entropy(
    vocabulary: Vocabulary, q: Distribution, p: None, targets: Int[Array, " c"], kept: None
) -> Float[Array, "c V"]:
    return q.probabilities - (jnp.arange(vocabulary.size) == vocabulary.local(targets)[:, None])


def _kl_divergence(
    vocabulary: Vocabulary, q: Distribution, p: Distribution, targets: Array
) -> tuple[Float[Array, "c 1"], None]:
    log_p = p.log(p.logits)
    return vocabulary.total(jnp.exp(log_p) * (log_p - q.log(q.logits))), None


def _d_kl_divergence(
    vocabulary: Vocabulary, q: Distribution, p: Distribution, targets: Array, kept: None
) -> Float[Array, "c V"]:
    return q.probabilities - p.probabilities


def _total_variation(
    vocabulary: Vocabulary, q: Distribution, p: Distribution, targets: Array
) -> tuple[Float[Array, "c 1"], Float[Array, "c 1"]]:
    difference = q.probabilities - p.probabilities
    return 0.5 * vocabulary.total(jnp.abs(difference)), vocabulary.total(q.probabilities * jnp.sign(difference))


def _d_total_variation(
    vocabulary: Vocabulary, q: Distribution, p: Distribution, targets: Array, mean_sign: Float[Array, "c 1"]
) -> Float[Array, "c V"]:
    return 0.5 * q.probabilities * (jnp.sign(q.probabilities - p.probabilities) - mean_sign)


LOSSES = {
    "ce": _Loss(_cross_entropy, _d_cross_entropy),
    "kl": _Loss(_kl_divergence, _d_kl_divergence),
    "tv": _Loss(_total_variation, _d_total_variation),
}


def loss_and_gradient(
    loss: _Loss,
    with_gradient: bool,
    vocabulary: Vocabulary,
    hidden_ND: Array,
    head_VD: Array,
    targets_N: Array,
    weights_NK: Array | None,
    teacher_ND: Array | None,
) -> Rows:
    """Rows in chunks of parts: logits are held for a part, their gradients (in the dtype of ``hidden``) for a chunk.

    The chunk is the larger, because each one reads and writes the whole float32 gradient of the head.
    """
    count, dtype = hidden_ND.shape[0], hidden_ND.dtype
    chunks, parts, rows = chunk_sizes(count, vocabulary.size, 1 if teacher_ND is None else 2, dtype.itemsize)

    def cut(array: Array | None) -> Array | None:
        if array is None:
            return None
        padded = jnp.pad(array, [(0, chunks * parts * rows - count)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunks, parts, rows, *array.shape[1:])

    def of_part(d_logits: Array | None, part: tuple[Array, Array, Array | None, Array]) -> tuple[Array | None, Array]:
        number, hidden, teacher, targets = part
        # One product for both: its rows are the more.
        logits = product("cd,vd->cv", hidden if teacher is None else jnp.concatenate([hidden, teacher]), head_VD)
        both = Distribution(logits, *vocabulary.normaliser(logits))

        def split(both: Distribution) -> tuple[Distribution, Distribution | None]:
            return (both, None) if teacher is None else (both.rows(0, rows), both.rows(rows, 2 * rows))

        losses, kept = loss.of_rows(vocabulary, *split(both), targets)
        if d_logits is not None:
            # Read the logits anew: probabilities shared with the losses would be written and read again.
            again = both._replace(logits=jax.lax.optimization_barrier(logits))
            new = loss.gradient(vocabulary, *split(again), targets, kept).astype(dtype)
            d_logits = jax.lax.dynamic_update_slice_in_dim(d_logits, new, number * rows, axis=0)
        return d_logits, losses[:, 0]

    def of_chunk(carry: tuple[Any, Any], chunk: tuple[Any, ...]) -> tuple[tuple[Any, Any], tuple[Array, Any]]:
        d_logits, d_head = carry
        hidden, teacher, targets, weights = chunk
        d_logits, losses = jax.lax.scan(of_part, d_logits, (jnp.arange(parts), hidden, teacher, targets))
        if d_logits is None:
            return carry, (losses, None)
        hidden = hidden.reshape(parts * rows, -1)
        d_hidden = product("cv,vd->cd", d_logits, head_VD)
        if vocabulary.axes:
            d_hidden = jax.lax.psum(d_hidden, vocabulary.axes)
        if d_head is not None:
            # All sets of weights side by side: one product, of two matrices (what XLA can do on every platform).
            weighted = (weights.reshape(parts * rows, -1, 1) * hidden[:, None]).astype(dtype)
            d_head = d_head + product("cv,cm->vm", d_logits, weighted.reshape(parts * rows, -1))
        return (d_logits, d_head), (losses, d_hidden.astype(dtype))

    # Every chunk writes into the same array.
    d_logits = jnp.zeros((parts * rows, vocabulary.size), dtype) if with_gradient else None
    d_head = None
    if weights_NK is not None:
        d_head = jnp.zeros((vocabulary.size, weights_NK.shape[1] * hidden_ND.shape[1]), jnp.float32)
    arrays = jax.tree.map(cut, (hidden_ND, teacher_ND, targets_N, weights_NK))
    (_, d_head), (losses, d_hidden) = jax.lax.scan(of_chunk, (d_logits, d_head), arrays)
    d_hidden = None if d_hidden is None else d_hidden.reshape(-1, hidden_ND.shape[1])[:count]
    if d_head is not None:
        d_head = d_head.reshape(vocabulary.size, -1, hidden_ND.shape[1])
    return Rows(losses.reshape(-1)[:count], d_hidden, d_head)


def chunk_sizes(count: int, vocabulary: int, arrays: int, itemsize: int) -> tuple[int, int, int]:
    """Chunks, parts of a chunk, and rows of a part, as even as they can be.

    ``arrays`` of float32 logits of a part, and one gradient of ``itemsize`` of a chunk, are held at a time.
    """
    most = most_rows(vocabulary, arrays)
    most_parts = max(1, SCRATCH_BYTES * 2 // 3 // (itemsize * vocabulary * most))
    chunks = -(-count // (most_parts * most))
    parts = -(-count // (chunks * most))
    rows = -(-count // (chunks * parts))
    return chunks, parts, rows if rows < _TILE else -(-rows // _TILE) * _TILE


def most_rows(vocabulary: int, arrays: int) -> int:
    """Rows of which so many arrays of float32 logits may be held."""
    rows = SCRATCH_BYTES // 3 // (4 * arrays * vocabulary)
    return rows // _TILE * _TILE or max(1, rows)


def product(equation: str, x: Array, y: Array) -> Array:
    """The product of two arrays in their dtype, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
