"""Driving a batch of token prompts through prefill and rounds, from the host.

Only the host knows text, so stop strings and streaming work on what a few rounds a call have committed; which tokens
come out does not depend on how many rounds a call runs.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from idlm_jax.backbone.flat import flat
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.cache import Cache, bucket, init_pools
from idlm_jax.decoding.logprobs import LogProbs
from idlm_jax.decoding.sampling import Filters, empty_drafts
from idlm_jax.decoding.step import DecodeState, Policy, decode_rounds, prefill_chunk
from idlm_jax.decoding.window import window_rows
from idlm_jax.errors import UserError

# Prompt tokens a prefill call stores for every request.
PREFILL_CHUNK = 256

_decode_rounds = jax.jit(decode_rounds, static_argnames=("policy",), donate_argnames=("state",))
_prefill_chunk = jax.jit(prefill_chunk, static_argnames=("adapter_from", "kernels"), donate_argnames=("cache",))


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for; names and meanings as in vLLM and the OpenAI API."""

    # 0 is greedy.
    temperature: float = 0.0
    # 0 or -1: off.
    top_k: int = 0
    # In (0, 1]; 1: off.
    top_p: float = 1.0
    # The text is a function of (prompt, seed, sampling parameters); None draws a seed (0 in token-level calls).
    seed: int | None = None
    # The text stops after this many tokens.
    max_tokens: int = 256
    # The text stops before the first of these strings.
    stop: tuple[str, ...] = ()
    # Tokens that end the text besides the model's own.
    stop_token_ids: tuple[int, ...] = ()
    # Go on past the model's end tokens.
    ignore_eos: bool = False

    def validate(self) -> None:
        """Raise UserError naming the first parameter that is out of range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be finite and not negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
        if not -1 <= self.top_k < 2**31:
            raise UserError(f"top_k must be positive and below 2^31, or 0 for off, not {self.top_k}")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2^32), not {self.seed}")
        if any(not stop for stop in self.stop):
            raise UserError("stop strings must not be empty")


@dataclass(frozen=True)
class DecodeStats:
    """What decoding one request took; derived from the history of its rounds."""

    tokens: int
    forwards: int
    # Rounds without drafts to verify.
    cold_rounds: int
    # accepted[k]: rounds in which at least k + 1 drafts were accepted; out of forwards - cold_rounds.
    accepted: tuple[int, ...]
    # For every round, how many tokens it emitted (the last one possibly cut).
    emitted_by_round: tuple[int, ...] = field(repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """TPF (method.md 6.2)."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """P_k, k = 1 … N - 1: share of verifying rounds that accepted the first k drafts."""
        warm = self.forwards - self.cold_rounds
        return tuple(count / warm if warm else 0.0 for count in self.accepted)

    @property
    def cold_share(self) -> float:
        """Share of forwards that verified nothing."""
        return self.cold_rounds / self.forwards if self.forwards else 0.0


def stats_from_history(history: np.ndarray, kept: int, stride: int) -> DecodeStats:
    """Statistics of the rounds that emitted the first ``kept`` tokens; ``history`` as in DecodeState."""
    emitted: list[int] = []
    left = kept
    for outcome in history:
        if left <= 0:
            break
        emitted.append(min(left, max(int(outcome), 0) + 1))
        left -= emitted[-1]
    used = history[: len(emitted)]
    accepted = tuple(int(np.sum(used >= depth)) for depth in range(1, stride))
    return DecodeStats(kept, len(emitted), int(np.sum(used < 0)) if stride > 1 else 0, accepted, tuple(emitted))


def total_stats(parts: Sequence[DecodeStats]) -> DecodeStats:
    """The statistics of several requests of the same stride together."""
    return DecodeStats(
        tokens=sum(part.tokens for part in parts),
        forwards=sum(part.forwards for part in parts),
        cold_rounds=sum(part.cold_rounds for part in parts),
        accepted=tuple(map(sum, zip(*(part.accepted for part in parts), strict=True))),
        emitted_by_round=tuple(count for part in parts for count in part.emitted_by_round),
    )


@dataclass(frozen=True)
class Emission:
    """What one request has emitted so far."""

    tokens: np.ndarray
    history: np.ndarray
    done: bool
    # Of every token, where the request asked for them.
    logprobs: LogProbs | None = None


def check_request(model: Qwen3, prompt: Sequence[int], sampling: SamplingParams, policy: Policy) -> None:
    """Raise UserError when a request cannot run: bad parameters, empty or too long a prompt, no mask token."""
    sampling.validate()
    config = model.config
    context = config.max_position_embeddings
    if not len(prompt):
        raise UserError("the prompt is empty")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise UserError(f"prompt token outside the vocabulary of {config.vocab_size}")
    if not all(0 <= token < config.vocab_size for token in sampling.stop_token_ids):
        raise UserError(f"stop token outside the vocabulary of {config.vocab_size}")
    if len(prompt) + sampling.max_tokens > context:
        raise UserError(
            f"prompt ({len(prompt)} tokens) + max_tokens ({sampling.max_tokens}) exceeds the model's context of "
            f"{context}: shorten the prompt or lower max_tokens"
        )
    if policy.stride == 1:
        return
    if config.mask_token_id is None:
        raise UserError(
            "this model names no mask token, which ISD needs; give one (mask_token) or decode with stride 1"
        )
    rows = window_rows(policy.layout, policy.stride)
    if rows > context:
        raise UserError(
            f"stride {policy.stride} with layout '{policy.layout.name}' needs a window of {rows} rows; "
            f"the model's context is {context}: use a smaller stride"
        )


def start(
    model: Qwen3, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], policy: Policy
) -> DecodeState:
    """Prefill a batch of prompts of any lengths and return the state before the first round.

    The last token of each prompt becomes its pending token, so that the first round is an ordinary cold round. Batch,
    cache and output sizes are rounded up to powers of two; added requests are done from the start.
    """
    for prompt, params in zip(prompts, sampling, strict=True):
        check_request(model, prompt, params, policy)
    batch = 1 << (len(prompts) - 1).bit_length()
    spare = batch - len(prompts)
    lengths = np.array([len(prompt) - 1 for prompt in prompts] + [0] * spare, np.int32)
    max_tokens = np.array([params.max_tokens for params in sampling] + [0] * spare, np.int32)
    rows = window_rows(policy.layout, policy.stride)
    chunk = min(PREFILL_CHUNK, bucket(max(int(lengths.max()), 1)))
    chunks = -(-int(lengths.max()) // chunk)
    slots = bucket(max(int((lengths + max_tokens).max()) + rows, chunks * chunk))

    tokens = np.zeros((batch, chunks * chunk), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[: len(prompt) - 1] = prompt[:-1]
    room = bucket(int(max_tokens.max()) + policy.stride)
    eos = _end_tokens(model, sampling, spare)
    state = idle_state(model, policy, [(batch, slots)], room, eos.shape[1])
    pending = [prompt[-1] for prompt in prompts] + [0] * spare
    return replace(
        state,
        cache=prefill(model, state.cache, tokens, policy),
        length=jnp.asarray(lengths),
        pending=jnp.asarray(pending, jnp.int32),
        done=jnp.arange(batch) >= len(prompts),
        filters=_filters(sampling, spare),
        max_tokens=jnp.asarray(max_tokens),
        eos=eos,
    )


def idle_state(
    model: Qwen3, policy: Policy, pools: Sequence[tuple[int, int]], room: int, end_tokens: int
) -> DecodeState:
    """A batch of requests that are all done: pools of (requests, cache slots), room for emitted and end tokens each."""
    batch = sum(requests for requests, _ in pools)
    return DecodeState(
        cache=init_pools(model.config, pools, model.dtype),
        slots=jnp.asarray([slots for requests, slots in pools for _ in range(requests)], jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        pending=jnp.zeros(batch, jnp.int32),
        drafts=empty_drafts(policy.coupling, batch, policy.stride - 1, model.config.vocab_size),
        warm=jnp.zeros(batch, bool),
        tokens=jnp.zeros((batch, room), jnp.int32),
        emitted=jnp.zeros(batch, jnp.int32),
        history=jnp.zeros((batch, room), jnp.int32),
        rounds=jnp.zeros(batch, jnp.int32),
        done=jnp.ones(batch, bool),
        filters=_filters([], batch),
        max_tokens=jnp.zeros(batch, jnp.int32),
        eos=jnp.full((batch, end_tokens), -1, jnp.int32),
    )


def prefill(model: Qwen3, cache: Cache, tokens: Int[np.ndarray, "B L"], policy: Policy) -> Cache:
    """Store the keys and values of padded prompts; ``cache`` is donated.

    More than PREFILL_CHUNK tokens must be a multiple of it.
    """
    chunk = min(PREFILL_CHUNK, max(tokens.shape[1], 1))
    for first in range(0, tokens.shape[1], chunk):
        part = jnp.asarray(tokens[:, first : first + chunk])
        cache = _prefill_chunk(model, cache, part, first, None if policy.gated else 0, policy.kernels)
    return cache


def _filters(sampling: Sequence[SamplingParams], spare: int) -> Filters:
    padded = [*sampling, *[SamplingParams()] * spare]
    seeds = np.array([params.seed or 0 for params in padded], np.uint32)
    return Filters(
        temperature=jnp.asarray([params.temperature for params in padded], jnp.float32),
        top_k=jnp.asarray([max(params.top_k, 0) for params in padded], jnp.int32),
        top_p=jnp.asarray([params.top_p for params in padded], jnp.float32),
        key=jax.vmap(jax.random.key)(seeds),
    )


def end_tokens(model: Qwen3, sampling: SamplingParams) -> tuple[int, ...]:
    """The tokens that end a request's text."""
    return (() if sampling.ignore_eos else model.config.eos_token_ids) + sampling.stop_token_ids


def _end_tokens(model: Qwen3, sampling: Sequence[SamplingParams], spare: int) -> jax.Array:
    ends = [end_tokens(model, params) for params in sampling] + [()] * spare
    # A few fixed widths, so that requests with other end tokens reuse the compiled program.
    width = max(4, 1 << (max(map(len, ends)) - 1).bit_length())
    return jnp.asarray([[*end, *[-1] * (width - len(end))] for end in ends], jnp.int32)


def advance(model: Qwen3, state: DecodeState, rounds: int, policy: Policy) -> DecodeState:
    """Run up to ``rounds`` rounds; ``state`` is donated and must not be used again."""
    return _decode_rounds(model, state, rounds, policy)


def end_requests(state: DecodeState, requests: Sequence[int]) -> DecodeState:
    """End some requests from the host, as a stop string does."""
    return replace(state, done=state.done.at[jnp.asarray(requests)].set(True)) if requests else state


def emissions(state: DecodeState, count: int) -> list[Emission]:
    """What the first ``count`` requests have emitted; one transfer from the device."""
    tokens, emitted, history, rounds, done = jax.device_get(
        (state.tokens, state.emitted, state.history, state.rounds, state.done)
    )
    return [Emission(tokens[i, : emitted[i]], history[i, : rounds[i]], bool(done[i])) for i in range(count)]


class Decoding:
    """A batch being decoded: the device state, the policy, and how long its parts took.

    Compilation is kept apart from decoding by a first call of zero rounds.
    """

    def __init__(
        self, model: Qwen3, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], policy: Policy
    ):
        self.model, self.policy, self.count = model, policy, len(prompts)
        # For a program that is called again and again.
        self._weights = flat(model)
        began = time.perf_counter()
        with model.on_its_mesh():
            state = start(model, prompts, sampling, policy)
            self.state: DecodeState = jax.block_until_ready(advance(self._weights, state, 0, policy))
        # Prefill and, the first time, compilation.
        self.start_seconds = time.perf_counter() - began
        # Rounds alone.
        self.seconds = 0.0

    def run(self, rounds: int) -> list[Emission]:
        """Run up to ``rounds`` rounds and return everything emitted so far."""
        began = time.perf_counter()
        with self.model.on_its_mesh():
            self.state = advance(self._weights, self.state, rounds, self.policy)
        so_far = emissions(self.state, self.count)
        self.seconds += time.perf_counter() - began
        return so_far

    def end(self, requests: Sequence[int]) -> None:
        """End some requests."""
        with self.model.on_its_mesh():
            self.state = end_requests(self.state, requests)


def generate_tokens(
    model: Qwen3, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], policy: Policy
) -> list[Emission]:
    """Decode a batch to its end; stop strings, which need a tokenizer, are not looked at."""
    return Decoding(model, prompts, sampling, policy).run(max(params.max_tokens for params in sampling))
