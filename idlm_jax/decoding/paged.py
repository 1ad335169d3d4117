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
from jaxtyping import Array, Bool, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding import admission
from idlm_jax.decoding.cache import BIN, PAGE, Cache, init_pages
from idlm_jax.decoding.generate import idle_state
from idlm_jax.decoding.logprobs import LogProbs, empty_record
from idlm_jax.decoding.sampling import Drafts
from idlm_jax.decoding.step import DecodeState, Policy, decode_rounds, prefill_chunk


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
    # Of those tokens, where a request asked; None where none can.
    logprobs: LogProbs | None


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


@partial(jax.jit, static_argnames=("rounds", "policy", "most_logprobs"), donate_argnames=("state",))
def run_requests(
    model: Qwen3,
    state: DecodeState,
    request_b: Int[Array, " b"],
    trust_b: Bool[Array, " b"],
    wanted_b: Bool[Array, " b"],
    rounds: int,
    policy: Policy,
    most_logprobs: int,
) -> tuple[DecodeState, Report]:
    """Up to ``rounds`` rounds of some requests; numbers beyond the batch are nobody. ``state`` is donated.

    ``policy`` may have any stride up to the one that the state has been made for. A request's drafts are verified only
    where ``trust`` says that there are enough of them: that its last round was not of a smaller stride. The report has
    log-probabilities, and the ``most_logprobs`` likely tokens of each place, of those that ``wanted`` them; 0 leaves
    them out of the program.
    """
    batch, most = state.drafts.tokens.shape
    part = jax.tree.map(lambda array: array.at[request_b].get(mode="clip"), replace(state, cache=()))
    before = replace(
        part,
        cache=state.cache,
        done=part.done | (request_b >= batch),
        warm=part.warm & trust_b,
        drafts=jax.tree.map(lambda drafts: drafts[:, : policy.stride - 1], part.drafts),
        logprobs=empty_record(wanted_b, part.emitted, rounds * policy.stride, most_logprobs) if most_logprobs else None,
    )
    after = decode_rounds(model, before, rounds, policy)
    missing = most - (policy.stride - 1)
    whole = replace(after, cache=(), drafts=_padded(after.drafts, missing), logprobs=None)
    state = replace(
        jax.tree.map(lambda old, new: old.at[request_b].set(new, mode="drop"), replace(state, cache=()), whole),
        cache=after.cache,
    )
    return state, _report(before, after, rounds, policy.stride)


def _padded(drafts: Drafts, missing: int) -> Drafts:
    return jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2))), drafts)


def _report(before: DecodeState, after: DecodeState, rounds: int, stride: int) -> Report:
    def window(array: Array, first_b: Array, width: int) -> Array:
        at = jnp.minimum(first_b[:, None] + jnp.arange(width), array.shape[1] - 1)
        return jnp.take_along_axis(array, at, axis=1)

    return Report(
        tokens=window(after.tokens, before.emitted, rounds * stride),
        count=after.emitted - before.emitted,
        history=window(after.history, before.rounds, rounds),
        rounds=after.rounds - before.rounds,
        done=after.done,
        logprobs=None if after.logprobs is None else after.logprobs.notes,
    )
