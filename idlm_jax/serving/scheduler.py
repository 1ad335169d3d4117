"""Who is decoded, who waits, and who gets which pages: first come, first served, by what the host knows.

The host plans a call while the device is still busy with the one before, so it knows a request's length as of the call
before that; pages are given for what both calls may write. Nothing here touches the device: a ``Plan`` says what to
tell it.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from jaxtyping import Int

from idlm_jax.decoding.admission import Answer, Request
from idlm_jax.decoding.generate import Emission
from idlm_jax.decoding.logprobs import LogProbs
from idlm_jax.serving.pages import Pages

# Prompt tokens that one prefill call takes, of several short prompts or of a long one: decoding is held up for so long.
PREFILL_TOKENS = 512
# The smallest chunk; others have four times as many tokens, and so on: few programs, and not much padding.
SHORTEST_CHUNK = 128
# Most prompt tokens between two calls of rounds.
PREFILL_BUDGET = 2048


class Job:
    """A request and what it has emitted, also before it was preempted."""

    def __init__(self, request: Request):
        most, prompt = request.sampling.max_tokens, len(request.prompt)
        self.request = request
        self._tokens = np.empty(prompt + most, np.int32)
        self._tokens[:prompt] = request.prompt
        # A round emits one token at least.
        self._history = np.empty(most, np.int32)
        self._logprobs = None
        if request.logprobs is not None:
            shape = (most, 1 + request.logprobs)
            self._logprobs = LogProbs(np.empty(shape, np.int32), np.empty(shape, np.float32))
        self.length, self._rounds = prompt, 0

    @property
    def tokens(self) -> Int[np.ndarray, " length"]:
        """The prompt and what has been emitted."""
        return self._tokens[: self.length]

    @property
    def emitted(self) -> Int[np.ndarray, " emitted"]:
        """What has been emitted."""
        return self._tokens[len(self.request.prompt) : self.length]

    @property
    def history(self) -> Int[np.ndarray, " rounds"]:
        """How many drafts each round has accepted, as in DecodeState."""
        return self._history[: self._rounds]

    @property
    def logprobs(self) -> LogProbs | None:
        """Of what has been emitted; None where the request has not asked."""
        count, noted = len(self.emitted), self._logprobs
        return None if noted is None else LogProbs(noted.ids[:count], noted.values[:count])

    def extend(
        self, tokens: Int[np.ndarray, " count"], history: Int[np.ndarray, " rounds"], logprobs: LogProbs | None
    ) -> None:
        """Take up what some rounds have emitted."""
        if self._logprobs is not None:
            assert logprobs is not None
            new = slice(len(self.emitted), len(self.emitted) + len(tokens))
            width = self._logprobs.ids.shape[1]
            self._logprobs.ids[new] = logprobs.ids[: len(tokens), :width]
            self._logprobs.values[new] = logprobs.values[: len(tokens), :width]
        self._tokens[self.length : self.length + len(tokens)] = tokens
        self._history[self._rounds : self._rounds + len(history)] = history
        self.length += len(tokens)
        self._rounds += len(history)


@dataclass(eq=False)
class Seat:
    """A job in a place; a job that was preempted gets another seat."""

    job: Job
    place: int
    # Tokens of the prompt (of a preempted job, of the text so far, too) whose keys the device has been told to store,
    # and those that it must store before the first round: all but the last.
    stored: int
    goal: int
    # Calls of rounds whose report has not come.
    calls: int = 0
    # Of the last of them: how many drafts the device holds.
    stride: int = 0


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt to store."""

    seat: Seat
    start: int
    tokens: Int[np.ndarray, " count"]


@dataclass
class Plan:
    """What to tell the device, in this order."""

    # One prefill call each: its chunks are padded to ``size`` tokens.
    prefills: list[tuple[int, list[Chunk]]] = field(default_factory=list)
    # Seats whose pages have changed; it may be before or after they are admitted.
    pages: list[Seat] = field(default_factory=list)
    # Seats whose prompts are stored now.
    admit: list[Seat] = field(default_factory=list)
    # Seats that take part in the next rounds.
    run: list[Seat] = field(default_factory=list)


class Scheduler:
    """Requests from submission to their last token."""

    def __init__(self, places: int, pages: Pages, tokens_a_call: int, window: int):
        """A call emits at most ``tokens_a_call`` tokens of a request; a round writes ``window`` slots."""
        self.pages = pages
        self._tokens_a_call, self._window = tokens_a_call, window
        self._waiting: deque[Job] = deque()
        # By admission: the oldest first.
        self._seats: dict[int, Seat] = {}
        self._prefilling: deque[Seat] = deque()
        self._free = list(reversed(range(places)))

    @property
    def running(self) -> int:
        """How many requests sit in places."""
        return len(self._seats)

    @property
    def waiting(self) -> int:
        """How many requests wait for a place or for pages."""
        return len(self._waiting)

    def slots(self, request: Request) -> int:
        """The most cache slots that a request can need."""
        # The last token is never stored, and the round that emits it begins at the latest before the one before it.
        return len(request.prompt) + request.sampling.max_tokens - 2 + self._window

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, of which each must find enough pages when it is alone."""
        self._waiting.extend(Job(request) for request in requests)

    def cancel(self, ids: Collection[int]) -> None:
        """Forget requests, wherever they are."""
        self._waiting = deque(job for job in self._waiting if job.request.id not in ids)
        for id in ids & self._seats.keys():
            self._leave(self._seats[id])

    def plan(self) -> Plan:
        """What the device should do next."""
        plan = Plan()
        self._grow(plan)
        self._admit(plan)
        self._prefill(plan)
        plan.run = [seat for seat in self._seats.values() if seat.stored == seat.goal]
        for seat in plan.run:
            seat.calls += 1
        return plan

    def collect(
        self,
        seat: Seat,
        tokens: Int[np.ndarray, " count"],
        history: Int[np.ndarray, " rounds"],
        done: bool,
        logprobs: LogProbs | None = None,
    ) -> Answer | None:
        """Take up what a call reported of a seat; None if its request has left it.

        ``logprobs`` are needed where the request asked for them; what they hold beyond ``tokens`` is not looked at.
        """
        if not self._holds(seat):
            return None
        seat.calls -= 1
        seat.job.extend(tokens, history, logprobs)
        if done:
            self._leave(seat)
        return Answer(seat.job.request, Emission(seat.job.emitted, seat.job.history, done, seat.job.logprobs))

    def _holds(self, seat: Seat) -> bool:
        return self._seats.get(seat.job.request.id) is seat

    def _leave(self, seat: Seat) -> None:
        """Take a seat's place and pages back; what it has stored can still be found."""
        id = seat.job.request.id
        if seat in self._prefilling:
            self._prefilling.remove(seat)
        else:
            self.pages.publish(id, seat.job.tokens[:-1])
        self.pages.release(id)
        del self._seats[id]
        self._free.append(seat.place)

    def _wanted(self, seat: Seat) -> int:
        """How many pages a seat needs for the calls under way and the next one."""
        ahead = self._tokens_a_call * (seat.calls + 1)
        return self.pages.pages_for(min(seat.job.length - 1 + ahead + self._window, self.slots(seat.job.request)))

    def _grow(self, plan: Plan) -> None:
        """Give seats the pages that they need next, the oldest first, at the expense of the youngest."""
        for seat in list(self._seats.values()):
            if not self._holds(seat):
                break
            id = seat.job.request.id
            missing = self._wanted(seat) - len(self.pages.of(id))
            if missing <= 0:
                continue
            while not self.pages.extend(id, missing):
                youngest = next(reversed(self._seats.values()))
                if youngest is seat:
                    # It waits with what it has: those before it will end.
                    return
                self._leave(youngest)
                self._waiting.appendleft(youngest.job)
            plan.pages.append(seat)

    def _admit(self, plan: Plan) -> None:
        """Give waiting requests places and pages, in order: where there are too few, nobody overtakes the first."""
        for job in list(self._waiting):
            if not self._free:
                break
            if self._can_share_soon(job):
                continue
            seat = Seat(job, self._free[-1], 0, job.length - 1)
            count = self._wanted(seat)
            # A page for each that runs is left, so that the newcomer is not preempted at once.
            known = self.pages.begin(job.request.id, job.tokens[:-1], count, spare=len(self._seats))
            if known is None:
                break
            seat.stored = known * self.pages.page
            self._waiting.remove(job)
            self._free.pop()
            self._seats[job.request.id] = seat
            plan.pages.append(seat)
            if seat.stored == seat.goal:
                plan.admit.append(seat)
            else:
                self._prefilling.append(seat)

    def _can_share_soon(self, job: Job) -> bool:
        """Whether a prompt that is being stored begins as a job's does, further than pages that it could share now."""
        if not self._prefilling:
            return False
        tokens, page = job.tokens[:-1], self.pages.page
        shared = max(_common_length(tokens, seat.job.tokens[:-1]) for seat in self._prefilling)
        return shared // page > self.pages.known(tokens)

    def _prefill(self, plan: Plan) -> None:
        """Chunks of the prompts that are not stored yet, in order."""
        for _ in range(PREFILL_BUDGET // PREFILL_TOKENS):
            if not self._prefilling:
                break
            size = chunk_size(self._prefilling[0].goal - self._prefilling[0].stored)
            chunks = [_next_chunk(seat, size) for seat in islice(self._prefilling, PREFILL_TOKENS // size)]
            plan.prefills.append((size, chunks))
            for chunk in chunks:
                seat = chunk.seat
                seat.stored += len(chunk.tokens)
                if seat.stored == seat.goal:
                    self._prefilling.remove(seat)
                    self.pages.publish(seat.job.request.id, seat.job.tokens[:-1])
                    plan.admit.append(seat)


def chunk_size(tokens: int) -> int:
    """The smallest chunk that holds so many tokens of a prompt, or the largest."""
    size = SHORTEST_CHUNK
    while size < min(tokens, PREFILL_TOKENS):
        size = min(4 * size, PREFILL_TOKENS)
    return size


def chunk_sizes(longest: int) -> list[int]:
    """All sizes that chunks of prompts of up to ``longest`` tokens can have."""
    return sorted({chunk_size(tokens) for tokens in range(1, longest + 1)})


def _next_chunk(seat: Seat, size: int) -> Chunk:
    return Chunk(seat, seat.stored, seat.job.tokens[seat.stored : min(seat.stored + size, seat.goal)])


def _common_length(a: Int[np.ndarray, " m"], b: Int[np.ndarray, " n"]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter
