"""The engine: continuous batching over pages, one call of rounds ahead of the host.

Requests, their lengths, filters, drafts and pages live on the device. While it runs a call, the host plans the next
from what the call before has reported, and dispatches it; then it reads what the first has reported. So the device
never waits for the host, and nothing is made anew when a request comes or goes.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import batched, product
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.backbone.flat import flat
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.admission import MOST_END_TOKENS, Answer, Request, admission, check_admission
from idlm_jax.decoding.cache import BIN, PAGE, cache_bytes
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.logprobs import LogProbs
from idlm_jax.decoding.paged import (
    Report,
    admit,
    give_pages,
    idle_paged_state,
    log_probabilities,
    prefill_pages,
    run_requests,
)
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import window_rows
from idlm_jax.errors import UserError
from idlm_jax.serving.pages import Pages
from idlm_jax.serving.scheduler import PREFILL_TOKENS, Chunk, Plan, Scheduler, Seat, chunk_sizes
from idlm_jax.serving.stride import StrideChooser

# Rounds between two looks at the texts: clients see new text, and a stop string ends one, at most so much later.
ROUNDS = 4
# Likely tokens that a request can ask for in each place, as vLLM has it.
MOST_LOGPROBS = 20
# Requests whose log-probabilities are computed at once; each token takes a row of logits of the whole vocabulary.
_LOGPROBS_AT_ONCE = 8
# Pages that the tables of a prefill call name: the smallest number, and how it grows.
_FEWEST_PAGES, _PAGES_FACTOR = 8, 4
# Tokens that requests have when costs are measured, at most.
_MEASURED_LENGTH = 512
# Calls that are measured in one go, the host ahead of the device as in service.
_MEASURED_CALLS = 4
# Programs compiled at once, at most: each takes memory.
_COMPILERS = 8
# Share of the free memory of a device that pages may take; the rest is for what programs need while they run.
_MEMORY_SHARE = 0.85


class Engine(Protocol):
    """Decodes requests side by side; everything but ``check`` is called from one thread."""

    @property
    def places(self) -> int:
        """How many requests are decoded at once."""
        ...

    @property
    def capacity(self) -> int:
        """Most tokens of a request, prompt included."""
        ...

    @property
    def most_logprobs(self) -> int:
        """How many likely tokens a request can ask for in each place; 0: it can have no log-probabilities."""
        ...

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        ...

    @property
    def waiting(self) -> int:
        """How many requests have been submitted and wait to be decoded."""
        ...

    @property
    def cache_used(self) -> float:
        """Share of the cache that requests hold."""
        ...

    def take_rounds(self) -> Mapping[str, int]:
        """How many rounds were run since this was last asked, by the name of the policy."""
        ...

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Compile every program that requests can need."""
        ...

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot run; any thread may ask."""
        ...

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, first come first served; raises UserError for the first that cannot run."""
        ...

    def cancel(self, ids: Collection[int]) -> None:
        """Forget requests, wherever they are; no later step returns them."""
        ...

    def step(self) -> list[Answer]:
        """Decode a few rounds; returns how far requests are, and each that ends once with ``emission.done``."""
        ...


class PagedEngine:
    """Requests in ``places``, their keys in ``pages``, decoded by one policy or by the best of several."""

    def __init__(
        self,
        model: Qwen3,
        policies: Sequence[Policy],
        places: int,
        capacity: int,
        pages: int | None = None,
        most_logprobs: int = MOST_LOGPROBS,
    ):
        """``policies`` share everything but stride and layout.

        ``pages`` in all; by default what all places need at full length, as far as the device has room. Without
        ``most_logprobs``, programs hold nothing for log-probabilities. Raises UserError where one request of full
        length does not find room.
        """
        self._model, self._places, self.capacity = model, places, capacity
        # For programs that are called again and again.
        self._weights = flat(model)
        # Of the vocabulary, one token, the mask, is never emitted.
        self.most_logprobs = min(most_logprobs, model.config.vocab_size - 1)
        self._widest = max(policies, key=lambda policy: policy.stride)
        self._window = max(window_rows(policy.layout, policy.stride) for policy in policies)
        # The last token of a request is never stored.
        self._pages_a_request = -(-(capacity - 2 + self._window) // PAGE)
        accounts = Pages(self._pages_that_fit(pages), PAGE)
        self._scheduler = Scheduler(places, accounts, ROUNDS * self._widest.stride, self._window)
        # Says how a call is decoded.
        self.strides = StrideChooser(policies)
        with model.on_its_mesh():
            self._state = idle_paged_state(
                model,
                self._widest,
                places,
                accounts.most + 1,
                self._pages_a_request,
                capacity + self._widest.stride,
                MOST_END_TOKENS,
            )
        # The call whose report has not been read: by which policy, and whose.
        self._last: tuple[Report, Policy, list[Seat], list[LogProbs]] | None = None
        self._rounds: Counter[str] = Counter()

    def _pages_that_fit(self, asked: int | None) -> int:
        config, dtype = self._model.config, self._model.dtype
        room = _free_memory(self._model) / cache_bytes(config, 1, PAGE, dtype)
        if asked is None:
            # One more is ``BIN``.
            asked = int(min(1 + self._places * self._pages_a_request, _MEMORY_SHARE * room))
        elif asked > room:
            raise UserError(
                f"a cache of {_gigabytes(self._model, asked)} does not fit into the "
                f"{_gigabytes(self._model, room)} that the device has left: lower --cache-gb"
            )
        if asked <= self._pages_a_request:
            most = (asked - 1) * PAGE + 2 - self._window
            needed = _gigabytes(self._model, self._pages_a_request + 1)
            raise UserError(
                f"a text of {self.capacity} tokens needs a cache of {needed}, and there are "
                f"{_gigabytes(self._model, asked)}: "
                + (f"lower --max-length to {most} or raise --cache-gb" if most > 1 else "raise --cache-gb")
            )
        return asked

    @property
    def places(self) -> int:
        """How many requests are decoded at once."""
        return self._places

    @property
    def running(self) -> int:
        """How many requests sit in places."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """How many requests wait for a place or for pages."""
        return self._scheduler.waiting

    @property
    def cache_used(self) -> float:
        """Share of the pages that requests hold; those that are kept for later prompts count as free."""
        pages = self._scheduler.pages
        return 1 - pages.available / pages.most

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot run, even alone."""
        check_admission(self._model, request, self._widest, self.capacity)
        if request.logprobs is not None and not self.most_logprobs:
            raise UserError("this engine keeps no log-probabilities")
        if request.logprobs is not None and not 0 <= request.logprobs <= self.most_logprobs:
            raise UserError(f"logprobs must be in 0 … {self.most_logprobs}, not {request.logprobs}")

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; raises UserError for the first that cannot run, and queues none of those after it."""
        for request in requests:
            self.check(request)
            self._scheduler.submit([request])

    def cancel(self, ids: Collection[int]) -> None:
        """Forget requests; the call under way may still decode them, and its report of them is not read."""
        self._scheduler.cancel(set(ids))

    def take_rounds(self) -> Mapping[str, int]:
        """How many rounds were run since this was last asked, by the name of the policy."""
        rounds, self._rounds = self._rounds, Counter()
        return rounds

    def step(self) -> list[Answer]:
        """Start the next rounds; returns how far requests were when the rounds before had ended."""
        plan = self._scheduler.plan()
        with self._model.on_its_mesh():
            self._prepare(plan)
            before, self._last = self._last, self._start(plan.run) if plan.run else None
        return [] if before is None else self._collect(*before)

    def _prepare(self, plan: Plan) -> None:
        """Tell the device about prompts, pages and newcomers."""
        for size, chunks in plan.prefills:
            self._prefill(size, chunks)
        if plan.pages:
            numbers = np.full(self._places, self._places, np.int32)
            numbers[: len(plan.pages)] = [seat.place for seat in plan.pages]
            self._state = give_pages(
                self._state, numbers, self._tables(plan.pages, self._places, self._pages_a_request)
            )
        if plan.admit:
            group = [(seat.place, seat.job.request) for seat in plan.admit]
            emitted = [seat.job.emitted for seat in plan.admit]
            self._state = admit(self._state, admission(self._model, group, self._places, self._places, emitted))

    def _tables(self, seats: Sequence[Seat], rows: int, width: int) -> np.ndarray:
        table = np.full((rows, width), BIN, np.int32)
        for row, seat in zip(table, seats, strict=False):
            numbers = self._scheduler.pages.of(seat.job.request.id)[:width]
            row[: len(numbers)] = numbers
        return table

    def _prefill(self, size: int, chunks: Sequence[Chunk]) -> None:
        rows = PREFILL_TOKENS // size
        tokens, start = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk.tokens)], start[row] = chunk.tokens, chunk.start
        slots = max(chunk.start + len(chunk.tokens) for chunk in chunks)
        width = next(width for width in self._prefill_widths() if width * PAGE >= slots)
        tables = self._tables([chunk.seat for chunk in chunks], rows, width)
        self._store(tokens, start, np.pad(tables, ((0, 0), (0, 1)), constant_values=BIN))

    def _store(self, tokens: np.ndarray, start: np.ndarray, tables: np.ndarray) -> None:
        self._state = replace(self._state, cache=prefill_pages(*self._stored(tokens, start, tables)))

    def _stored(self, tokens: np.ndarray, start: np.ndarray, tables: np.ndarray) -> tuple[Any, ...]:
        policy = self._widest
        adapter_from = None if policy.gated else 0
        return self._weights, self._state.cache, tokens, start, tables, adapter_from, policy.kernels

    def _prefill_widths(self) -> list[int]:
        widths = [self._pages_a_request]
        while widths[0] >= _PAGES_FACTOR * _FEWEST_PAGES:
            widths.insert(0, -(-widths[0] // _PAGES_FACTOR))
        return widths

    def _start(self, seats: list[Seat]) -> tuple[Report, Policy, list[Seat], list[LogProbs]]:
        """Dispatch a call of rounds."""
        size = next(size for size in self._sizes() if size >= len(seats))
        policy = self.strides.choose(size)
        numbers, trust = np.full(size, self._places, np.int32), np.zeros(size, bool)
        numbers[: len(seats)] = [seat.place for seat in seats]
        trust[: len(seats)] = [seat.stride >= policy.stride for seat in seats]
        for seat in seats:
            seat.stride = policy.stride
        report = self._run(numbers, trust, policy)
        noted = self._log_probabilities(report, [row for row, seat in enumerate(seats) if _asks(seat)])
        # Stays on the device.
        report = replace(report, decided=None)
        for array in jax.tree.leaves((report, noted)):
            array.copy_to_host_async()
        return report, policy, seats, noted

    def _run(self, numbers: np.ndarray, trust: np.ndarray, policy: Policy) -> Report:
        self._state, report = run_requests(*self._rounds_of(numbers, trust, policy))
        return report

    def _rounds_of(self, numbers: np.ndarray, trust: np.ndarray, policy: Policy) -> tuple[Any, ...]:
        noted = ROUNDS * self._widest.stride if self.most_logprobs else 0
        return self._weights, self._state, numbers, trust, ROUNDS, policy, noted

    def _log_probabilities(self, report: Report, rows: Sequence[int]) -> list[LogProbs]:
        """Those of some rows of a call, a few rows at a time."""
        if report.decided is None:
            return []
        groups = [np.array(group, np.int32) for group in batched(rows, _LOGPROBS_AT_ONCE)]
        padded = [np.pad(group, (0, _LOGPROBS_AT_ONCE - len(group)), mode="edge") for group in groups]
        return [log_probabilities(self._weights, report.decided, group, self.most_logprobs) for group in padded]

    def _sizes(self) -> Iterator[int]:
        """Requests a call: powers of two, and all places."""
        size = 1
        while size < self._places:
            yield size
            size *= 2
        yield self._places

    def _collect(self, report: Report, policy: Policy, seats: Sequence[Seat], noted: list[LogProbs]) -> list[Answer]:
        tokens, history = np.asarray(report.tokens), np.asarray(report.history)
        count, rounds, done = (np.asarray(each).tolist() for each in (report.count, report.rounds, report.done))
        logprobs = (
            LogProbs(*of_row)
            for group in noted
            for of_row in zip(*map(np.asarray, (group.ids, group.values)), strict=True)
        )
        self._rounds[_name(policy)] += max(rounds)
        # AR has nothing to verify.
        history = np.where(np.arange(ROUNDS) < np.array(rounds)[:, None], history if policy.stride > 1 else -1, -1)
        answers, rows = [], []
        for row, seat in enumerate(seats):
            outcomes = history[row, : rounds[row]]
            said = next(logprobs) if _asks(seat) else None
            answer = self._scheduler.collect(seat, tokens[row, : count[row]], outcomes, done[row], said)
            if answer is not None:
                answers.append(answer)
                rows.append(row)
        # What is thrown away teaches nothing: it is decoded again with the same noise, and under the ratio coupling the
        # text has the right distribution only if the way it is decoded does not depend on that noise.
        self.strides.observe(policy, history[rows])
        return answers

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Compile prefill and rounds in all sizes; where there is a choice of policies, measure what they cost."""
        with self._model.on_its_mesh():
            self._warm_up(say)

    def _warm_up(self, say: Callable[[str], None]) -> None:
        began = time.monotonic()
        self._compile([(prefill_pages, self._stored(*_no_prompts(*shape))) for shape in self._prefill_shapes()], say)
        for shape in self._prefill_shapes():
            self._store(*_no_prompts(*shape))
        policies = self.strides.policies
        # What the first two cost says which of the others can be the fastest.
        for some in policies[:2], policies[2:]:
            pairs = [pair for pair in product(self._sizes(), some) if self.strides.worth_measuring(*pair)]
            self._compile([(run_requests, self._rounds_of(*self._nobody(size), policy)) for size, policy in pairs], say)
            for size, policy in filter(lambda pair: self.strides.worth_measuring(*pair), pairs):
                seconds = self._measure(size, policy)
                self.strides.measured(size, policy, seconds)
                say(f"{size} requests at once, {_name(policy)}: {1e3 * seconds:.2f} ms a round")
        self._rest()
        say(f"ready after {time.monotonic() - began:.0f} s")

    def _prefill_shapes(self) -> list[tuple[int, int]]:
        return [(size, width) for size in chunk_sizes(self.capacity) for width in self._prefill_widths()]

    def _nobody(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(size, self._places, np.int32), np.zeros(size, bool)

    def _compile(self, calls: list[tuple[Any, tuple[Any, ...]]], say: Callable[[str], None]) -> None:
        """Compile programs for such arguments side by side; a call then finds what ``compile`` has made."""

        def compiled(program: Any, arguments: tuple[Any, ...]) -> None:
            with self._model.on_its_mesh():
                program.lower(*arguments).compile()

        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _COMPILERS))
        try:
            say(f"compiling {len(calls)} programs")
            jobs = [pool.submit(compiled, *call) for call in calls]
            for number, job in enumerate(as_completed(jobs), 1):
                job.result()
                say(f"compiled {number} of {len(calls)} programs")
        finally:
            pool.shutdown(cancel_futures=True)

    def _measure(self, size: int, policy: Policy) -> float:
        """The seconds that a round of so many requests takes where calls follow each other without a gap."""
        seconds, numbers = [], np.arange(size, dtype=np.int32)
        for _ in range(3):
            self._occupy(size)
            began = time.perf_counter()
            reports = [self._run(numbers, np.zeros(size, bool), policy) for _ in range(_MEASURED_CALLS)]
            jax.block_until_ready(reports)
            seconds.append((time.perf_counter() - began) / (ROUNDS * _MEASURED_CALLS))
            jax.block_until_ready(self._log_probabilities(reports[-1], [0]))
        return min(seconds)

    def _occupy(self, size: int) -> None:
        """Let places look as if requests were in them, each in pages of its own as far as there are enough."""
        # Greedy, without end tokens.
        sampling = SamplingParams(max_tokens=self.capacity, ignore_eos=True)
        length = min(_MEASURED_LENGTH, self.capacity // 2)
        group = [(place, Request(-1, [0] * length, sampling)) for place in range(size)]
        state = admit(self._state, admission(self._model, group, self._places, self._places))
        tables = np.arange(self._places * self._pages_a_request, dtype=np.int32) % self._scheduler.pages.most
        tables = BIN + 1 + tables.reshape(self._places, -1)
        self._state = jax.block_until_ready(give_pages(state, np.arange(self._places, dtype=np.int32), tables))

    def _rest(self) -> None:
        """Nobody sits anywhere."""
        tables = self._tables([], self._places, self._pages_a_request)
        state = give_pages(self._state, np.arange(self._places, dtype=np.int32), tables)
        self._state = replace(state, done=jnp.ones(self._places, bool))


def _no_prompts(size: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, first slots and tables of a prefill call that stores nothing of anybody."""
    rows = PREFILL_TOKENS // size
    return np.zeros((rows, size), np.int32), np.zeros(rows, np.int32), np.full((rows, width + 1), BIN, np.int32)


def _asks(seat: Seat) -> bool:
    return seat.job.request.logprobs is not None


def _name(policy: Policy) -> str:
    return "AR" if policy.stride == 1 else f"N = {policy.stride} {policy.layout.name}"


def pages_in(model: Qwen3, memory: float) -> int:
    """How many pages so many bytes hold, ``BIN`` included."""
    return int(memory) // cache_bytes(model.config, 1, PAGE, model.dtype)


def _gigabytes(model: Qwen3, pages: float) -> str:
    return f"{pages * cache_bytes(model.config, 1, PAGE, model.dtype) / 1e9:.3g} GB"


def _free_memory(model: Qwen3) -> float:
    """Bytes that the devices among which the key heads are split have left together, as far as they tell."""
    devices = jax.local_devices()[:1] if model.mesh is None else model.mesh.devices.flat
    stats = [device.memory_stats() for device in devices]
    free = [each["bytes_limit"] - each["bytes_in_use"] if each else math.inf for each in stats]
    return min(free) * (1 if model.mesh is None else model.mesh.shape["tp"])
