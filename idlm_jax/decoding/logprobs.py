"""Log-probabilities of emitted tokens and of the most likely ones in their places, as the OpenAI API reports them.

They are the model's own, before temperature, top-k and top-p: those say how to draw, not what the model thinks.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.decoding.sampling import without_token
from pallas_kernels.dispatch import by_request


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogProbs:
    """Of every emitted token: itself first, then the most likely tokens in its place, the best first."""

    ids: Int[Array | np.ndarray, "*rows T K+1"]
    values: Float[Array | np.ndarray, "*rows T K+1"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """What one call of rounds notes about the tokens that it emits."""

    # Which requests asked; for the others nothing is noted.
    wanted: Bool[Array, " B"]
    # How many tokens each had emitted when the call began: the first that it emits is number 0 of its notes.
    start: Int[Array, " B"]
    notes: LogProbs


def empty_record(wanted: Bool[Array, " B"], emitted: Int[Array, " B"], tokens: int, most: int) -> Record:
    """Nothing noted yet, with room for so many tokens a request and the ``most`` likely ones in each place."""
    shape = (*wanted.shape, tokens, 1 + most)
    return Record(wanted, emitted, LogProbs(jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))


def note(
    record: Record,
    logits_BWV: Float[Array, "B W V"],
    tokens_BN: Int[Array, "B N"],
    emitted_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
    removed: int | None,
) -> Record:
    """Note what a round's clean rows, the first N, say about the tokens that they decided.

    ``emitted`` is how many there were before the round. ``removed`` is a token that can never be drawn, the mask;
    probabilities are of all others. What is noted for a request that takes no part, or beyond the tokens it emits, is
    never read.
    """

    def noted() -> LogProbs:
        # Sliced here: outside, XLA would copy the rows whether anybody asks or not.
        clean_BNV = logits_BWV[:, : tokens_BN.shape[1]]
        of_rows = partial(log_probs, most=record.notes.ids.shape[-1] - 1, removed=removed)
        new = by_request(of_rows, clean_BNV, tokens_BN)
        put = jax.vmap(lambda old, values, at: jax.lax.dynamic_update_slice(old, values, (at, 0)))
        at = emitted_B - record.start
        return LogProbs(put(record.notes.ids, new.ids, at), put(record.notes.values, new.values, at))

    # Where nobody asks, the logits are not read a second time.
    asked = jnp.any(record.wanted & active_B)
    return replace(record, notes=jax.lax.cond(asked, noted, lambda: record.notes))


def log_probs(logits: Float[Array, "*rows V"], tokens: Int[Array, "*rows"], most: int, removed: int | None) -> LogProbs:
    """Log-softmax in float32 at the tokens and at the ``most`` likely ones, all but ``removed`` taken together."""
    logits = without_token(logits, removed)
    ids = jnp.concatenate([tokens[..., None], jax.lax.top_k(logits, most)[1]], axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return LogProbs(ids, jnp.take_along_axis(logits, ids, axis=-1) - total)
