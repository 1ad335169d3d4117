"""A continuous batch: a fixed number of places, each free for the next request as soon as its own has ended.

Which request sits in which place beside which others changes nothing about its text: its cache holds what its own
tokens put there, its noise is its own, and what an earlier request left in the place lies where nobody looks.

Places come in pools of different capacity (vLLM's pages, but coarse), since a round reads the whole cache: a request
begins in a small place and moves, cache and all, to a larger one when it has filled the small one.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from idlm_jax.backbone.layers import split_axes
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.admission import (
    MOST_END_TOKENS,
    Admission,
    Answer,
    Request,
    admission,
    admit,
    check_admission,
    put,
)
from idlm_jax.decoding.cache import Cache, LayerCache, bucket, init_cache
from idlm_jax.decoding.generate import PREFILL_CHUNK, Emission, idle_state, prefill
from idlm_jax.decoding.step import DecodeState, Policy, decode_rounds, running
from idlm_jax.decoding.window import window_rows

# Prompts a prefill call takes, and requests a call puts into places. One number, so that the programs a prompt runs
# through depend on its own length alone, whatever is admitted with it.
ADMIT_ROWS = 32
# Prompts are padded to this, to PREFILL_CHUNK, or to a power of two beyond: each size is a program to compile.
SHORT_PROMPT = 64

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """Places of one capacity."""

    places: int
    # Most tokens of a request while it sits here, prompt included.
    capacity: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Report:
    """What a call leaves for the host, in buffers that the next call does not take over; fields as in DecodeState."""

    tokens: Int[Array, "B T"]
    emitted: Int[Array, " B"]
    history: Int[Array, "B T"]
    rounds: Int[Array, " B"]
    done: Bool[Array, " B"]
    # Not done, but without room for another round.
    full: Bool[Array, " B"]


def _put_cache(layer: LayerCache, source: LayerCache, row: Array, place: Array) -> LayerCache:
    """Copy rows of ``source`` to places of a layer's cache, each in whichever pool it lies.

    On a mesh that splits requests, rows and places are anywhere: each device gets the rows and keeps its own.
    """
    copied, first = [], 0
    for pair in batched(layer, 2):
        count, axes = pair[0].shape[0], split_axes(pair[0])
        everywhere, there = (None, None) if axes is None else (PartitionSpec(None, *axes[1:]), PartitionSpec(*axes))
        local = jnp.where((place >= first) & (place < first + count), place - first, count)
        first += count
        for old, new in zip(pair, source, strict=True):
            stored = min(old.shape[2], new.shape[2])
            rows = new.at[row, :, :stored].get(mode="clip", out_sharding=everywhere)
            copied.append(old.at[local, :, :stored].set(rows, mode="drop", out_sharding=there))
    return tuple(copied)


@partial(jax.jit, donate_argnames=("state",))
def _fill(state: DecodeState, prefilled: Cache, row: Int[Array, " F"], new: Admission) -> DecodeState:
    """Put requests into places, each with the keys and values of a row of prefilled prompts."""
    layers = zip(state.cache, prefilled, strict=True)
    return replace(
        admit(state, new), cache=tuple(_put_cache(layer, source, row, new.place) for layer, source in layers)
    )


@partial(jax.jit, static_argnames=("pool",), donate_argnames=("state",))
def _move(state: DecodeState, pool: int, source: Int[Array, " F"], target: Int[Array, " F"]) -> DecodeState:
    """Move requests from places of one pool to places of larger ones."""
    first = sum(layer.shape[0] for layer in state.cache[0][: 2 * pool : 2])

    def move(old: Array) -> Array:
        return put(old, target, old.at[source].get(mode="clip"))

    cache = tuple(_put_cache(layer, layer[2 * pool : 2 * pool + 2], source - first, target) for layer in state.cache)
    moved = jax.tree.map(move, replace(state, cache=()))
    return replace(moved, cache=cache, slots=state.slots, done=put(moved.done, source, True))


@partial(jax.jit, static_argnames=("policy",), donate_argnames=("state",))
def _run(model: Qwen3, state: DecodeState, rounds: Int[Array, ""], policy: Policy) -> tuple[DecodeState, _Report]:
    state = decode_rounds(model, state, rounds, policy)
    full = ~state.done & ~running(state, policy)
    return state, _Report(state.tokens, state.emitted, state.history, state.rounds, state.done, full)


class SlotBatch:
    """Requests decoded side by side in pools of places, from a queue that ``submit`` fills.

    ``run`` hands the device a call and then collects what the call *before* it has finished, so that the device never
    waits for the host; a request that ends is therefore returned one call later.
    """

    def __init__(self, model: Qwen3, policy: Policy, pools: Sequence[Pool]):
        """``pools`` from the smallest capacity to the largest."""
        self._model, self._policy = model, policy
        self._capacity = pools[-1].capacity
        # A request that waits for a larger place still writes a window: it takes no part in rounds, but no harm either.
        rows = window_rows(policy.layout, policy.stride)
        slots = [(pool.places, pool.capacity - 2 + 2 * rows) for pool in pools]
        with model.on_its_mesh():
            state = idle_state(model, policy, slots, self._capacity + policy.stride, MOST_END_TOKENS)
            self._state = replace(state, slots=state.slots - rows)
        self._pools = pools
        self._pool_of = [number for number, pool in enumerate(pools) for _ in range(pool.places)]
        self._owners: list[Request | None] = [None] * len(self._pool_of)
        self._free: list[list[int]] = [[] for _ in pools]
        for place in reversed(range(len(self._owners))):
            self._release(place)
        self._waiting: deque[Request] = deque()
        # Places whose request needs a larger one, longest wait first.
        self._full: dict[int, Request] = {}
        # The call whose results have not been looked at, and who sat where when it began.
        self._last: tuple[_Report, list[Request | None]] | None = None
        self._admit_rows = min(ADMIT_ROWS, len(self._owners))
        # One for every size of prompts; what a prefill finds there lies beyond what it stores.
        self._prefill_caches: dict[int, Cache] = {}

    @property
    def room(self) -> int:
        """How many more requests would find a free place."""
        return max(0, sum(map(len, self._free)) - len(self._waiting))

    @property
    def busy(self) -> bool:
        """Whether a request has been submitted that ``run`` has not returned."""
        return bool(self._waiting) or any(self._owners)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; raises UserError for the first that cannot run, and queues none of those after it."""
        for request in requests:
            check_admission(self._model, request, self._policy, self._capacity)
            self._waiting.append(request)

    def run(self, rounds: int) -> list[Answer]:
        """Start up to ``rounds`` rounds; returns the requests that ended before the last call did, by place."""
        with self._model.on_its_mesh():
            self._move_on()
            self._admit()
            self._state, report = _run(self._model, self._state, rounds, self._policy)
        for array in jax.tree.leaves(report):
            array.copy_to_host_async()
        before, self._last = self._last, (report, list(self._owners))
        return [] if before is None else self._collect(*before)

    def _collect(self, report: _Report, owners: Sequence[Request | None]) -> list[Answer]:
        tokens, history = np.asarray(report.tokens), np.asarray(report.history)
        emitted, rounds = np.asarray(report.emitted), np.asarray(report.rounds)
        done, full = np.asarray(report.done), np.asarray(report.full)
        answers = []
        for place in np.flatnonzero(done | full).tolist():
            owner = owners[place]
            # A place that was left or refilled after that call has another owner now.
            if owner is None or owner is not self._owners[place]:
                continue
            if full[place]:
                self._full.setdefault(place, owner)
                continue
            emission = Emission(tokens[place, : emitted[place]].copy(), history[place, : rounds[place]].copy(), True)
            answers.append(Answer(owner, emission))
            self._release(place)
        return answers

    def _take_place(self, request: Request, at_least: int) -> int | None:
        """Give a request a free place of the smallest pool that has one, from pool ``at_least`` on."""
        for free in self._free[at_least:]:
            if free:
                self._owners[free[-1]] = request
                return free.pop()
        return None

    def _release(self, place: int) -> None:
        self._owners[place] = None
        self._free[self._pool_of[place]].append(place)

    def _move_on(self) -> None:
        """Move requests that have filled their places to larger ones, as far as there are any."""
        moves: dict[int, list[tuple[int, int]]] = {}
        for place, request in list(self._full.items()):
            target = self._take_place(request, self._pool_of[place] + 1)
            if target is None:
                continue
            moves.setdefault(self._pool_of[place], []).append((place, target))
            del self._full[place]
        nowhere = len(self._owners)
        for pool, pairs in moves.items():
            for group in batched(pairs, self._admit_rows):
                padded = [*group, *[(nowhere, nowhere)] * (self._admit_rows - len(group))]
                source, target = np.array(padded, np.int32).T
                self._state = _move(self._state, pool, source, target)
            # Not before: none of them may be the target of another move of the same call.
            for place, _ in pairs:
                self._release(place)

    def _admit(self) -> None:
        """Give waiting requests free places, in order; prompts that several of them share are prefilled once."""
        admitted: dict[Prompt, list[tuple[int, Request]]] = {}
        while self._waiting:
            request = self._waiting[0]
            place = self._take_place(request, self._smallest_pool(len(request.prompt)))
            if place is None:
                break
            self._waiting.popleft()
            admitted.setdefault(tuple(request.prompt), []).append((place, request))
        for size, prompts in _by_size(admitted, self._admit_rows):
            prefilled = self._prefill(size, prompts)
            pairs = [(row, pair) for row, prompt in enumerate(prompts) for pair in admitted[prompt]]
            for group in batched(pairs, self._admit_rows):
                rows = np.zeros(self._admit_rows, np.int32)
                rows[: len(group)] = [row for row, _ in group]
                new = admission(self._model, [pair for _, pair in group], self._admit_rows, len(self._owners))
                self._state = _fill(self._state, prefilled, rows, new)

    def _smallest_pool(self, prompt_tokens: int) -> int:
        return next(i for i, pool in enumerate(self._pools) if prompt_tokens < pool.capacity)

    def _prefill(self, size: int, prompts: Sequence[Prompt]) -> Cache:
        """Keys and values of all but the last token of each prompt."""
        chunk = min(size, PREFILL_CHUNK)
        longest = max(len(prompt) for prompt in prompts) - 1
        tokens = np.zeros((self._admit_rows, -(-longest // chunk) * chunk), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt) - 1] = prompt[:-1]
        cache = self._prefill_caches.pop(size, None)
        if cache is None:
            cache = init_cache(self._model.config, self._admit_rows, size, self._model.dtype)
        self._prefill_caches[size] = prefill(self._model, cache, tokens, self._policy)
        return self._prefill_caches[size]


def _by_size(prompts: Iterable[Prompt], most: int) -> Iterator[tuple[int, tuple[Prompt, ...]]]:
    """Different prompts in groups for one prefill call each: the cache slots they take, and the prompts."""
    by_size: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        length = len(prompt) - 1
        size = SHORT_PROMPT if length <= SHORT_PROMPT else bucket(max(length, PREFILL_CHUNK))
        by_size.setdefault(size, []).append(prompt)
    for size, same_size in sorted(by_size.items()):
        for group in batched(same_size, most):
            yield size, group
