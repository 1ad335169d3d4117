"""A batch whose key/value cache lies in pages: the state it begins with, and the programs that serving calls.

The host says which pages a request has (``idlm_jax.serving.pages``); the device never takes one by itself. A request
whose next window does not fit into its pages waits, unchanged, until it is given more. A call names the requests that
take part: pages stay where they are, so leaving some out costs a copy of a few numbers, and the others are a smaller
batch.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding import admission
from idlm_jax.decoding.cache import BIN, PAGE, Cache, init_pages
from idlm_jax.decoding.generate import idle_state
from idlm_jax.decoding.logprobs import LogProbs, Record, log_probs
from idlm_jax.decoding.sampling import Drafts
from idlm_jax.decoding.step import DecodeState, Policy, decode_rounds, prefill_chunk
from pallas_kernels.dispatch import by_request


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decided:
    """The tokens of a call and what decided them, in as many rows and places for whatever requests and policy."""

    tokens: Int[Array, "B T"]
    hidden: Float[Array, "B T D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
    """What a call of R rounds leaves for the host, of each request that took part."""

    # The first ``count`` were emitted.
    tokens: Int[Array, "b R*N"]
    count: Int[Array, " b"]
    # Of its rounds, as in DecodeState; the first ``rounds`` are valid.
    history: Int[Array, "b R"]
    rounds: Int[Array, " b"]
    done: Bool[Array, " b"]
    # None where nobody can ask for log-probabilities.
    decided: Decided | None


def idle_paged_state(
    model: Qwen3, policy: Policy, requests: int, pages: int, pages_a_request: int, room: int, end_tokens: int
) -> DecodeState:
    """A batch of requests that are all done and have no pages, of ``pages`` in all (``BIN`` included)."""
    state = idle_state(model, policy, [(requests, 0)], room, end_tokens)
    return replace(
        state,
        cache=init_pages(model.config, pages, PAGE, model.dtype),
        pages=jnp.full((requests, pages_a_request), BIN, jnp.int32),
    )


@partial(jax.jit, donate_argnames=("state",))
def give_pages(state: DecodeState, request_F: Int[Array, " F"], pages_FN: Int[Array, "F N"]) -> DecodeState:
    """All pages that some requests have from now on, ``BIN`` after the last; ``state`` is donated.

    Numbers of requests beyond the batch are passed over.
    """
    assert state.pages is not None
    slots_F = jnp.sum(pages_FN != BIN, axis=1) * state.cache[0][0].shape[2]
    return replace(
        state,
        pages=state.pages.at[request_F].set(pages_FN, mode="drop"),
        slots=state.slots.at[request_F].set(slots_F, mode="drop"),
    )


# Cache arrays pass through: donated, they are not copied.
admit = jax.jit(admission.admit, donate_argnames=("state",))


@partial(jax.jit, static_argnames=("adapter_from", "kernels"), donate_argnames=("cache",))
def prefill_pages(
    model: Qwen3,
    cache: Cache,
    tokens_FC: Int[Array, "F C"],
    start_F: Int[Array, " F"],
    pages_FN: Int[Array, "F N"],
    adapter_from: int | None,
    kernels: str,
) -> Cache:
    """Store C tokens of each request's prompt from slot ``start`` on; ``cache`` is donated.

    The last entry of every table must be ``BIN``: padding that is longer than the pages goes there.
    """
    return prefill_chunk(model, cache, tokens_FC, start_F, adapter_from, kernels, pages_FN)


@partial(jax.jit, static_argnames=("rounds", "policy", "noted"), donate_argnames=("state",))
def run_requests(
    model: Qwen3,
    state: DecodeState,
    request_b: Int[Array, " b"],
    trust_b: Bool[Array, " b"],
    rounds: int,
    policy: Policy,
    noted: int,
) -> tuple[DecodeState, Report]:
    """So many rounds of some requests; numbers beyond the batch are nobody. ``state`` is donated.

    ``policy`` may have any stride up to the one that the state has been made for. A request's drafts are verified only
    where ``trust`` says that there are enough of them: that its last round was not of a smaller stride. ``noted`` is
    the room for what decided the tokens, 0 or as many as any policy can emit.
    """
    batch, most = state.drafts.tokens.shape
    part = jax.tree.map(lambda array: array.at[request_b].get(mode="clip"), replace(state, cache=()))
    before = replace(
        part,
        cache=state.cache,
        done=part.done | (request_b >= batch),
        warm=part.warm & trust_b,
        drafts=jax.tree.map(lambda drafts: drafts[:, : policy.stride - 1], part.drafts),
        record=_empty_record(model, part.emitted, noted) if noted else None,
    )
    after = decode_rounds(model, before, rounds, policy)
    missing = most - (policy.stride - 1)
    whole = replace(after, cache=(), drafts=_padded(after.drafts, missing), record=None)
    state = replace(
        jax.tree.map(lambda old, new: old.at[request_b].set(new, mode="drop"), replace(state, cache=()), whole),
        cache=after.cache,
    )
    return state, _report(before, after, rounds * policy.stride, rounds, batch)


@partial(jax.jit, static_argnames=("most",))
def log_probabilities(model: Qwen3, decided: Decided, row_G: Int[Array, " G"], most: int) -> LogProbs:
    """Of the tokens of some rows of a call; and of the ``most`` likely ones in each place."""
    logits = model.logits(decided.hidden[row_G])
    of_rows = partial(log_probs, most=most, removed=model.config.mask_token_id)
    return by_request(of_rows, logits, decided.tokens[row_G])


def _empty_record(model: Qwen3, emitted_b: Int[Array, " b"], tokens: int) -> Record:
    return Record(emitted_b, jnp.zeros((*emitted_b.shape, tokens, model.config.hidden_size), model.dtype))


def _padded(drafts: Drafts, missing: int) -> Drafts:
    return jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2))), drafts)


def _report(before: DecodeState, after: DecodeState, tokens: int, rounds: int, batch: int) -> Report:
    def window(array: Array, first_b: Array, width: int) -> Array:
        at = jnp.minimum(first_b[:, None] + jnp.arange(width), array.shape[1] - 1)
        return jnp.take_along_axis(array, at, axis=1)

    def rows(array: Array) -> Array:
        return jnp.pad(array, ((0, batch - len(array)), *[(0, 0)] * (array.ndim - 1)))

    decided = None
    if after.record is not None:
        hidden = after.record.hidden
        decided = Decided(rows(window(after.tokens, before.emitted, hidden.shape[1])), rows(hidden))
    return Report(
        tokens=window(after.tokens, before.emitted, tokens),
        count=after.emitted - before.emitted,
        history=window(after.history, before.rounds, rounds),
        rounds=after.rounds - before.rounds,
        done=after.done,
        decided=decided,
    )
