"""Whatever comes, goes and is preempted, the device is told to read each request's own keys, and all requests end."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from idlm_jax.decoding.admission import Request
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.serving import scheduler
from idlm_jax.serving.pages import Pages
from idlm_jax.serving.scheduler import Plan, Scheduler, Seat

PAGE, ROUNDS, STRIDE, WINDOW = 4, 2, 2, 3
LONGEST, MOST = 10, 20
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several chunks, and chunks of several prompts."""
    set_chunks(monkeypatch.setattr)


def set_chunks(put: Any) -> None:
    for name, value in (("PREFILL_TOKENS", 4), ("SHORTEST_CHUNK", 2), ("PREFILL_BUDGET", 8)):
        put(scheduler, name, value)


def request(id: int, prompt: list[int], max_tokens: int) -> Request:
    return Request(id, prompt, SamplingParams(max_tokens=max_tokens))


def whole_text(request: Request) -> list[int]:
    """What a request's text will be; a function of the request alone."""
    return [*request.prompt, *[(7 * request.id + i) % 3 for i in range(request.sampling.max_tokens)]]


@dataclass
class Place:
    """What a device knows of a place."""

    pages: list[int] = field(default_factory=list)
    request: Request | None = None
    length: int = 0
    done: bool = True


class Device:
    """Does what plans say, and remembers which text's key is in every slot of every page."""

    def __init__(self, places: int, pages: int):
        self.places = [Place() for _ in range(places)]
        # The text up to and with the token whose key is there.
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.pages = pages
        self.prefilled = 0

    def write(self, pages: list[int], position: int, text: tuple[int, ...]) -> None:
        if position // PAGE < len(pages):
            self.slots[pages[position // PAGE], position % PAGE] = text

    def do(self, plan: Plan, pages: Pages, rng: np.random.Generator) -> list[tuple[Seat, list[int], list[int], bool]]:
        for size, chunks in plan.prefills:
            assert len(chunks) * size <= scheduler.PREFILL_TOKENS
            for chunk in chunks:
                text, own = chunk.seat.job.tokens.tolist(), list(pages.of(chunk.seat.job.request.id))
                assert chunk.tokens.tolist() == text[chunk.start : chunk.start + len(chunk.tokens)]
                self.prefilled += len(chunk.tokens)
                for position in range(chunk.start, chunk.start + size):
                    # What padding stores is nobody's.
                    real = position < chunk.start + len(chunk.tokens)
                    self.write(own, position, tuple(text[: position + 1]) if real else (-1,))
        for seat in plan.pages:
            self.places[seat.place].pages = list(pages.of(seat.job.request.id))
        for seat in plan.admit:
            place = self.places[seat.place]
            place.request, place.length, place.done = seat.job.request, seat.job.length - 1, False
        return [self.decode(seat, rng) for seat in plan.run]

    def decode(self, seat: Seat, rng: np.random.Generator) -> tuple[Seat, list[int], list[int], bool]:
        place, tokens, history = self.places[seat.place], [], []
        assert place.request is seat.job.request
        text = whole_text(place.request)
        for _ in range(ROUNDS):
            if place.done or place.length + WINDOW > PAGE * len(place.pages):
                break
            for position in range(place.length):
                slot = place.pages[position // PAGE], position % PAGE
                assert self.slots.get(slot) == tuple(text[: position + 1]), "another's key"
            for position in range(place.length, place.length + WINDOW):
                self.write(place.pages, position, (-1,))
            new = min(int(rng.integers(1, STRIDE + 1)), len(text) - 1 - place.length)
            for position in range(place.length, place.length + new):
                self.write(place.pages, position, tuple(text[: position + 1]))
            tokens += text[place.length + 1 : place.length + 1 + new]
            history.append(new - 1)
            place.length += new
            place.done = place.length == len(text) - 1
        return seat, tokens, history, place.done


class Serving(RuleBasedStateMachine):
    """Requests come, are cancelled, and are decoded a call ahead of what the scheduler knows."""

    @initialize(places=st.integers(1, 4), pages=st.integers(9, 16), seed=st.integers(0, 999))
    def open(self, places: int, pages: int, seed: int) -> None:
        # A request of the longest kind needs 8 pages.
        self.pages, self.count = Pages(pages, PAGE), pages
        self.scheduler = Scheduler(places, self.pages, ROUNDS * STRIDE, WINDOW)
        self.device, self.rng = Device(places, pages), np.random.default_rng(seed)
        self.open_requests: dict[int, Request] = {}
        self.known: dict[int, int] = {}
        self.next, self.under_way = 0, []

    @rule(asked=st.lists(st.tuples(PROMPTS, st.integers(1, MOST)), min_size=1, max_size=4))
    def come(self, asked: list[tuple[list[int], int]]) -> None:
        for prompt, most in asked:
            new = request(self.next, prompt, most)
            assert self.pages.pages_for(self.scheduler.slots(new)) <= self.pages.most
            self.scheduler.submit([new])
            self.open_requests[self.next], self.known[self.next] = new, 0
            self.next += 1

    @precondition(lambda self: self.open_requests)
    @rule(data=st.data())
    def go(self, data: Any) -> None:
        gone = data.draw(st.sampled_from(sorted(self.open_requests)))
        self.scheduler.cancel({gone, 10_000})
        del self.open_requests[gone]

    @rule(times=st.integers(1, 5))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()
            self.accounts_balance()

    def step(self) -> None:
        waiting = self.scheduler.waiting
        plan = self.scheduler.plan()
        event(f"preempted: {self.scheduler.waiting > waiting}")
        before, self.under_way = self.under_way, self.device.do(plan, self.pages, self.rng)
        for seat, tokens, history, done in before:
            answer = self.scheduler.collect(seat, np.array(tokens, int), np.array(history, int), done)
            if answer is None:
                continue
            asked, emission = answer.request, answer.emission
            assert self.open_requests[asked.id] is asked
            text = whole_text(asked)[len(asked.prompt) :]
            assert emission.tokens.tolist() == text[: len(emission.tokens)]
            assert len(emission.tokens) >= self.known[asked.id]
            assert len(emission.tokens) == sum(emission.history + 1)
            self.known[asked.id] = len(emission.tokens)
            assert emission.done == (len(emission.tokens) == len(text))
            if emission.done:
                del self.open_requests[asked.id]

    @invariant()
    def accounts_balance(self) -> None:
        if not hasattr(self, "pages"):
            return
        self.pages.check()
        assert self.scheduler.running + self.scheduler.waiting == len(self.open_requests)
        assert len(self.scheduler._free) + self.scheduler.running == len(self.device.places)

    def teardown(self) -> None:
        if not hasattr(self, "pages"):
            return
        # Each text takes at most MOST calls, some for its prompt, and may be preempted by those that came before it.
        for _ in range(40 * (1 + len(self.open_requests))):
            if not self.open_requests:
                break
            self.step()
            self.accounts_balance()
        assert not self.open_requests, "requests that never end"
        assert self.pages.available == self.pages.most


@pytest.fixture(scope="class")
def chunks_for_the_machine() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        set_chunks(patch.setattr)
        yield


@pytest.mark.usefixtures("chunks_for_the_machine")
class TestServing(Serving.TestCase):
    """The machine, with small chunks."""


TestServing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def run_to_the_end(scheduler: Scheduler, device: Device) -> dict[int, list[int]]:
    """All texts, in the order in which they end."""
    texts, under_way, rng = {}, [], np.random.default_rng(1)
    while scheduler.running or scheduler.waiting:
        before, under_way = under_way, device.do(scheduler.plan(), scheduler.pages, rng)
        for seat, tokens, history, done in before:
            answer = scheduler.collect(seat, np.array(tokens, int), np.array(history, int), done)
            if answer is not None and done:
                texts[answer.request.id] = answer.emission.tokens.tolist()
    return texts


def test_where_pages_are_short_the_youngest_goes_back_and_says_the_same_text_later() -> None:
    pages = Pages(9, PAGE)
    schedule, device = Scheduler(3, pages, ROUNDS * STRIDE, WINDOW), Device(3, 9)
    requests = [request(i, [i % 2] * 3, 20) for i in range(3)]
    schedule.submit(requests)
    left = []
    leave = schedule._leave
    schedule._leave = lambda seat: left.append(seat.job.request.id) or leave(seat)
    texts = run_to_the_end(schedule, device)
    assert texts == {r.id: whole_text(r)[3:] for r in requests}
    assert list(texts) == [0, 1, 2]  # first come, first served
    assert left.count(0) == 1 and left.count(1) > 1


def test_a_prompt_that_was_stored_before_is_not_stored_again() -> None:
    pages, prompt = Pages(20, PAGE), list(range(10))
    schedule, device = Scheduler(2, pages, ROUNDS * STRIDE, WINDOW), Device(2, 20)
    schedule.submit([request(0, prompt, 2)])
    run_to_the_end(schedule, device)
    assert device.prefilled == 9
    schedule.submit([request(1, [*prompt[:8], 99, 98, 97], 2)])
    run_to_the_end(schedule, device)
    assert device.prefilled == 9 + 2


def test_nobody_overtakes_the_first_in_the_line() -> None:
    pages = Pages(7, PAGE)
    schedule = Scheduler(3, pages, ROUNDS * STRIDE, WINDOW)
    schedule.submit([request(0, [1] * 8, 1), request(1, [2] * 10, 9), request(2, [3], 1)])
    plan = schedule.plan()
    assert [seat.job.request.id for seat in plan.pages] == [0]
    assert schedule.running == 1 and schedule.waiting == 2


def test_prompts_that_begin_alike_and_come_together_wait_for_the_first_and_share_its_pages() -> None:
    pages, prompt = Pages(60, PAGE), list(range(13))
    schedule, device = Scheduler(4, pages, ROUNDS * STRIDE, WINDOW), Device(4, 60)
    schedule.submit([request(0, prompt, 5), request(1, prompt, 5), request(2, [7] * 5, 5), request(3, prompt, 5)])
    plan = schedule.plan()
    # The others do not hold up who has nothing to do with them.
    assert [seat.job.request.id for seat in plan.pages] == [0, 2]
    device.do(plan, pages, np.random.default_rng(0))
    texts = run_to_the_end(schedule, device)
    assert set(texts) == {0, 1, 2, 3}
    assert device.prefilled == 12 + 4
