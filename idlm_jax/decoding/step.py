"""One ISD round and the loop of rounds: verify the drafts of the round before, emit, draft again (method.md 3.8).

AR decoding is stride 1 of the same program: a window of one row, no drafts. Everything a round decides is decided on
the device; the loop stops after a number of rounds, so that streaming and one-shot decoding are the same call.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.cache import BIN, Cache
from idlm_jax.decoding.forward import forward
from idlm_jax.decoding.logprobs import Record, note
from idlm_jax.decoding.sampling import Coupling, Drafts, Filters, empty_drafts
from idlm_jax.decoding.window import Layout, build_window, window_rows
from pallas_kernels.dispatch import by_request
from pallas_kernels.verify.api import draft, verify


@dataclass(frozen=True)
class Policy:
    """How to decode; static, one compiled program each."""

    # Most tokens a forward pass can emit; 1 is AR.
    stride: int
    layout: Layout
    coupling: Coupling
    # True: an adapter acts on mask rows only, and the text is the base model's. False: on every row.
    gated: bool = True
    # "auto", or "xla" for no kernel.
    kernels: str = "auto"

    @property
    def adapter_from(self) -> int:
        """First row of the window on which an adapter acts."""
        return self.stride if self.gated else 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything a batch of requests carries from round to round."""

    # Keys and values of committed tokens: slots 0 … length - 1 of every request, in places of its own or in pages.
    cache: Cache
    # Cache slots the request may use. Where a round's window would not fit, the request waits, unchanged.
    slots: Int[Array, " B"]
    length: Int[Array, " B"]
    # Last emitted token, whose keys and values are not stored yet (at the start: the last prompt token).
    pending: Int[Array, " B"]
    drafts: Drafts
    # Whether the drafts stand right after the pending token; False makes the next round cold.
    warm: Bool[Array, " B"]
    # Emitted tokens (the first ``emitted`` are valid), and for every round the number of accepted drafts, -1 if cold.
    tokens: Int[Array, "B T"]
    emitted: Int[Array, " B"]
    history: Int[Array, "B T"]
    rounds: Int[Array, " B"]
    done: Bool[Array, " B"]
    # The request: filters and seed, the most tokens to emit, and the tokens that end the text (padded with -1).
    filters: Filters
    max_tokens: Int[Array, " B"]
    eos: Int[Array, "B E"]
    # Of a paged cache: the pages of every request in order of its slots, ``BIN`` after them.
    pages: Int[Array, "B N"] | None = None
    # What decided the tokens that this call emits; None where nobody can ask for their log-probabilities.
    record: Record | None = None


def decode_round(model: Qwen3, state: DecodeState, policy: Policy) -> DecodeState:
    """One forward pass and its consequences for every request that is not done."""
    stride, mask_token_id = policy.stride, model.config.mask_token_id
    active = running(state, policy)
    length, pages = state.length, state.pages
    if pages is not None:
        # A request that takes no part writes to no page of its own, and there is nothing for it to read.
        length, pages = jnp.where(active, length, 0), jnp.where(active[:, None], pages, BIN)
    window = build_window(
        policy.layout, stride, mask_token_id or 0, length, state.pending, state.drafts.tokens, state.warm
    )
    hidden, cache = forward(
        model,
        window.tokens,
        window.positions,
        length,
        window.mask,
        state.cache,
        policy.adapter_from,
        policy.kernels,
        pages,
    )
    choose = partial(_choose_tokens, policy=policy, removed=mask_token_id)
    # At stride 1 there are none, and arrays without elements cannot be exchanged (XLA on CPU crashes, jax 0.11.2).
    before = None if stride == 1 else state.drafts
    logits = model.logits(hidden)
    accepted, token, new = by_request(choose, logits, state.filters, before, state.warm, state.emitted)
    drafts = state.drafts if new is None else new
    after = replace(
        state,
        cache=cache,
        length=state.length + accepted + 1,
        pending=token,
        drafts=drafts,
        warm=policy.layout.next_warm(state.warm, accepted, stride),
    )
    after = _emit(state, after, accepted, token, active)
    if state.record is None:
        return after
    return replace(after, record=note(state.record, hidden, state.emitted, stride))


def _choose_tokens(
    logits: Float[Array, "B W V"],
    filters: Filters,
    drafts: Drafts | None,
    warm: Bool[Array, " B"],
    emitted: Int[Array, " B"],
    *,
    policy: Policy,
    removed: int | None,
) -> tuple[Int[Array, " B"], Int[Array, " B"], Drafts | None]:
    """Number of drafts accepted, the token that follows them, and the next drafts; no drafts are None."""
    stride, coupling = policy.stride, policy.coupling
    run = {"removed": removed, "implementation": policy.kernels}
    positions = emitted[:, None] + jnp.arange(stride)
    accepted, token = verify(
        logits,
        filters,
        coupling,
        drafts or empty_drafts(coupling, logits.shape[0], 0, logits.shape[2]),
        warm,
        positions,
        **run,
    )
    if drafts is None:
        return accepted, token, None
    first_row = stride + policy.layout.surviving_group(accepted) * (stride - 1)
    rows = first_row[:, None] + jnp.arange(stride - 1)
    after_token = (positions + accepted[:, None] + 1)[:, :-1]
    return accepted, token, draft(logits, rows, filters, coupling, after_token, **run)


def running(state: DecodeState, policy: Policy) -> Bool[Array, " B"]:
    """Which requests take part in the next round: those that are not done and have cache slots for its window."""
    return ~state.done & (state.length + window_rows(policy.layout, policy.stride) <= state.slots)


def _emit(
    before: DecodeState,
    after: DecodeState,
    accepted: Int[Array, " B"],
    token: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> DecodeState:
    """Append the accepted drafts and the next token, up to the first end token or the request's limit."""
    depth = before.drafts.tokens.shape[1]
    k = jnp.arange(depth + 1)
    padded = jnp.pad(before.drafts.tokens, ((0, 0), (0, 1)))
    new = jnp.where(k < accepted[:, None], padded, token[:, None])  # beyond ``accepted`` the next token repeats
    ends = jnp.any(new[:, :, None] == before.eos[:, None, :], axis=2)
    until_end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, depth + 1)
    room = before.max_tokens - before.emitted
    count = jnp.minimum(jnp.minimum(accepted + 1, until_end), room)
    finished = jnp.any(ends, axis=1) | (count == room)

    outcome = jnp.where(before.warm, accepted, -1)
    append = jax.vmap(lambda row, values, start: jax.lax.dynamic_update_slice(row, values, (start,)))
    emitted = replace(
        after,
        tokens=append(before.tokens, new, before.emitted),
        emitted=before.emitted + jnp.where(active, count, 0),
        history=append(before.history, outcome[:, None], before.rounds),
        rounds=before.rounds + active,
        done=before.done | (active & finished),
    )
    # A request that takes no part keeps its state; what it wrote beyond its length and counts is never read.
    return replace(
        emitted,
        length=jnp.where(active, after.length, before.length),
        pending=jnp.where(active, after.pending, before.pending),
        warm=jnp.where(active, after.warm, before.warm),
        drafts=jax.tree.map(
            lambda new, old: jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old), after.drafts, before.drafts
        ),
    )


def decode_rounds(model: Qwen3, state: DecodeState, rounds: Int[Array, ""] | int, policy: Policy) -> DecodeState:
    """Up to ``rounds`` rounds, fewer if every request ends or waits before.

    A number that is known when the program is compiled is kept to, whoever ends: the device then need not tell the host
    after each round whether to go on, so that the host can queue what comes next.
    """
    if isinstance(rounds, int):
        return jax.lax.fori_loop(0, rounds, lambda _, state: decode_round(model, state, policy), state)

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        i, state = carry
        return (i < rounds) & jnp.any(running(state, policy))

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, state = carry
        return i + 1, decode_round(model, state, policy)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def prefill_chunk(
    model: Qwen3,
    cache: Cache,
    tokens: Int[Array, "B C"],
    start: Int[Array, "#B"] | Int[Array, ""],
    adapter_from: int | None,
    kernels: str = "auto",
    pages_BN: Int[Array, "B N"] | None = None,
) -> Cache:
    """Store the keys and values of C prompt tokens of every request at its slots ``start …``; computes no logits.

    Shorter prompts are padded on the right: what the padding stores lies beyond their length and is never read. Of a
    paged cache, ``pages`` are those of each request; what lies beyond them goes to the last, which must be ``BIN``.
    """
    batch, rows = tokens.shape
    start_B = jnp.broadcast_to(start, (batch,))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool)), (batch, rows, rows))
    positions = start_B[:, None] + jnp.arange(rows)
    return forward(model, tokens, positions, start_B, causal, cache, adapter_from, kernels, pages_BN)[1]
