"""Requests on their way into a batch that is already being decoded: who may come, and what the device is told."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.generate import Emission, SamplingParams, check_request, end_tokens
from idlm_jax.decoding.sampling import Filters
from idlm_jax.decoding.step import DecodeState, Policy
from idlm_jax.errors import UserError

# Tokens that can end one request.
MOST_END_TOKENS = 8


@dataclass(frozen=True)
class Request:
    """A text to decode."""

    # The caller's name for it.
    id: int
    prompt: Sequence[int]
    sampling: SamplingParams
    # How many of the most likely tokens to report in the place of each, besides its own log-probability; None for no
    # log-probabilities at all. For engines that serve.
    logprobs: int | None = None


@dataclass(frozen=True)
class Answer:
    """A request and all it has emitted so far."""

    request: Request
    emission: Emission


def check_admission(model: Qwen3, request: Request, policy: Policy, capacity: int) -> None:
    """Raise UserError for a request that cannot run in a batch whose requests have ``capacity`` tokens at most."""
    check_request(model, request.prompt, request.sampling, policy)
    if len(request.prompt) + request.sampling.max_tokens > capacity:
        raise UserError(
            f"prompt ({len(request.prompt)} tokens) + max_tokens ({request.sampling.max_tokens}) exceeds the "
            f"{capacity} tokens that the batch has room for"
        )
    if len(end_tokens(model, request.sampling)) > MOST_END_TOKENS:
        raise UserError(f"at most {MOST_END_TOKENS} tokens can end a text")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Admission:
    """Requests and their places, padded with a place that does not exist; fields as in DecodeState."""

    place: Int[Array, " F"]
    length: Int[Array, " F"]
    pending: Int[Array, " F"]
    emitted: Int[Array, " F"]
    max_tokens: Int[Array, " F"]
    eos: Int[Array, "F E"]
    temperature: Float[Array, " F"]
    top_k: Int[Array, " F"]
    top_p: Float[Array, " F"]
    seed: UInt[Array, " F"]


def admission(
    model: Qwen3,
    group: Sequence[tuple[int, Request]],
    rows: int,
    nowhere: int,
    emitted: Sequence[Int[np.ndarray, " count"]] | None = None,
) -> Admission:
    """(place, request) as ``rows`` rows, those left over with the place ``nowhere``.

    ``emitted`` are the tokens that each has emitted before it comes (again).
    """
    requests = [request for _, request in group]
    sampling = [request.sampling for request in requests]
    both = list(zip(requests, emitted or [np.empty(0, np.int32)] * len(group), strict=True))
    eos: Any = np.full((rows, MOST_END_TOKENS), -1, np.int32)
    for row, params in zip(eos, sampling, strict=False):
        ends = end_tokens(model, params)
        row[: len(ends)] = ends

    # Arrays of numpy: each jnp call here would be one more launch.
    def padded(values: Sequence[Any], dtype: Any, filler: int = 0) -> Any:
        array = np.full(rows, filler, dtype)
        array[: len(values)] = values
        return array

    ints, floats = partial(padded, dtype=np.int32), partial(padded, dtype=np.float32)
    return Admission(
        place=ints([place for place, _ in group], filler=nowhere),
        length=ints([len(request.prompt) + len(said) - 1 for request, said in both]),
        pending=ints([said[-1] if len(said) else request.prompt[-1] for request, said in both]),
        emitted=ints([len(said) for _, said in both]),
        max_tokens=ints([params.max_tokens for params in sampling]),
        eos=eos,
        temperature=floats([params.temperature for params in sampling]),
        top_k=ints([max(params.top_k, 0) for params in sampling]),
        top_p=floats([params.top_p for params in sampling]),
        seed=padded([params.seed or 0 for params in sampling], np.uint32),
    )


def put(old: Array, place: Int[Array, " F"], value: Array | int | bool) -> Array:
    """Set entries of places; those that do not exist are passed over."""
    return old.at[place].set(value, mode="drop")


def admit(state: DecodeState, new: Admission) -> DecodeState:
    """Put requests into places: the state before their first round, but for the cache."""
    put_new = partial(put, place=new.place)
    return replace(
        state,
        length=put_new(state.length, value=new.length),
        pending=put_new(state.pending, value=new.pending),
        warm=put_new(state.warm, value=False),
        emitted=put_new(state.emitted, value=new.emitted),
        rounds=put_new(state.rounds, value=0),
        done=put_new(state.done, value=False),
        filters=Filters(
            temperature=put_new(state.filters.temperature, value=new.temperature),
            top_k=put_new(state.filters.top_k, value=new.top_k),
            top_p=put_new(state.filters.top_p, value=new.top_p),
            key=put_new(state.filters.key, value=jax.vmap(jax.random.key)(new.seed)),
        ),
        max_tokens=put_new(state.max_tokens, value=new.max_tokens),
        eos=put_new(state.eos, value=new.eos),
    )
