"""Log-probabilities of emitted tokens and of the most likely ones in their places, as the OpenAI API reports them.

They are the model's own, before temperature, top-k and top-p: those say how to draw, not what the model thinks.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.layers import split_axes
from idlm_jax.decoding.sampling import without_token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogProbs:
    """Of every emitted token: itself first, then the most likely tokens in its place, the best first."""

    ids: Int[Array | np.ndarray, "*rows T K+1"]
    values: Float[Array | np.ndarray, "*rows T K+1"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """What decided the tokens that one call of rounds emits: enough to tell log-probabilities afterwards."""

    # How many tokens each request had emitted when the call began: the first that it emits is number 0 here.
    start: Int[Array, " B"]
    # Final hidden state of the row that decided each token.
    hidden: Float[Array, "B T D"]


def note(record: Record, hidden_BWD: Float[Array, "B W D"], emitted_B: Int[Array, " B"], stride: int) -> Record:
    """Note the clean rows of a round, the first ``stride``: row i decides the i-th token that it emits.

    ``emitted`` is how many there were before the round. What is noted for a request that takes no part, or beyond the
    tokens it emits, is never read.
    """
    clean_BND = hidden_BWD[:, :stride]
    if split_axes(clean_BND) is not None:
        # As everything that a request carries besides its cache.
        clean_BND = jax.reshard(clean_BND, PartitionSpec())
    put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0)))
    return replace(record, hidden=put(record.hidden, clean_BND, emitted_B - record.start))


def log_probs(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], most: int, removed: int | None) -> LogProbs:
    """Log-softmax in float32 at the tokens and at the ``most`` likely ones, all but ``removed`` taken together."""
    logits = without_token(logits, removed)
    ids = jnp.concatenate([tokens[..., None], jax.lax.top_k(logits, most)[1]], axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return LogProbs(ids, jnp.take_along_axis(logits, ids, axis=-1) - total)
