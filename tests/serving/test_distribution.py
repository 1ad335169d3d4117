"""Texts of the engine follow AR's distribution exactly, by enumeration, also of those that were preempted.

Ways to decode are switched by what the rounds before accepted, the worst that a chooser could do: if noise that had
been looked at were used again, texts would show it.
"""

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding import paged
from idlm_jax.decoding.admission import Request
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import window_rows
from idlm_jax.serving import engine as engine_module
from idlm_jax.serving import scheduler
from idlm_jax.serving.engine import PagedEngine
from tests.decoding.helpers import make_policy
from tests.decoding.support import PROMPT, TEXT_LENGTH, Cell, enumerate_texts, fit, tiny_model

SAMPLES = 20_000
CELLS = [
    (Cell(3, "standard", "ratio", 1.0, 0, 1.0, False), 16),
    (Cell(2, "branch", "gumbel", 1.3, 3, 0.8, True), 64),
]
ALL_CELLS = [
    (Cell(stride, layout, coupling, 1.0, 0, 1.0, adapter), places)
    for stride, layout, coupling, adapter, places in (
        (2, "standard", "ratio", True, 8),
        (3, "branch", "ratio", False, 8),
        (3, "standard", "gumbel", True, 64),
        (4, "branch", "gumbel", False, 16),
        (4, "standard", "ratio", True, 64),
        (4, "branch", "ratio", True, 16),
    )
]


@pytest.fixture(autouse=True)
def a_round_a_call_and_a_slot_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of four tokens grow out of their pages only if calls and pages are this short."""
    for module in (paged, engine_module):
        monkeypatch.setattr(module, "PAGE", 1)
    monkeypatch.setattr(engine_module, "ROUNDS", 1)
    for module in (scheduler, engine_module):
        monkeypatch.setattr(module, "PREFILL_TOKENS", 64)
    monkeypatch.setattr(scheduler, "SHORTEST_CHUNK", 2)
    monkeypatch.setattr(PagedEngine, "_sizes", lambda self: iter([self.places]))


@cache
def _model(adapter: bool) -> Qwen3:
    return tiny_model(adapter=adapter)


def ways(cell: Cell) -> list[Policy]:
    """AR, the cell's own way, and the other layout with a smaller stride."""
    other = "branch" if cell.layout == "standard" else "standard"
    ar, smaller = make_policy(1, cell.layout, cell.coupling), make_policy(max(2, cell.stride - 1), other, cell.coupling)
    return [ar, cell.policy, smaller]


class Served:
    """An engine that serves the prompt again and again, and how it went."""

    def __init__(self, cell: Cell, places: int):
        self.cell, self.places = cell, places
        capacity = len(PROMPT) + TEXT_LENGTH
        rows = max(window_rows(way.layout, way.stride) for way in ways(cell))
        # So few that a text is preempted every now and then: of wide strides, which grow only once or twice, fewer.
        pages = (rows + 1) * places if cell.stride < 4 else rows * places // 2
        self.engine = PagedEngine(_model(cell.adapter), ways(cell), places, capacity, pages)
        self.preempted, self.used = 0, set()
        strides, schedule, accepted, calls = self.engine.strides, self.engine._scheduler, [0], itertools.count()
        grow, begin = schedule._grow, schedule.pages.begin
        # Those who come leave nothing for others, and get no more than they need at once.
        schedule.pages.begin = lambda request, tokens, count, spare: begin(request, tokens, count)
        schedule._tokens_a_call = 1

        def choose(requests: int) -> Policy:
            policy = ways(cell)[(accepted[0] + next(calls)) % 3]
            self.used.add(policy)
            return policy

        def observe(policy: Policy, history: np.ndarray) -> None:
            # Of the last to come, who is the first to be preempted.
            accepted[0] = int(history[-1, -1]) + 1 if len(history) else 0

        def count_preempted(plan: scheduler.Plan) -> None:
            waiting = schedule.waiting
            grow(plan)
            self.preempted += schedule.waiting - waiting

        strides.choose, strides.observe, schedule._grow = choose, observe, count_preempted

    def texts(self, samples: int) -> Iterator[np.ndarray]:
        """Requests of seeds of their own, that come at random."""
        cell, rng, next_seed = self.cell, np.random.default_rng(0), 0
        texts = np.zeros((samples, TEXT_LENGTH), np.int32)
        while next_seed < samples or self.engine.running or self.engine.waiting:
            count = min(
                int(rng.integers(0, 2 * self.places)), samples - next_seed, 3 * self.places - self.engine.waiting
            )
            for seed in range(next_seed, next_seed + max(count, 0)):
                sampling = SamplingParams(cell.temperature, cell.top_k, cell.top_p, seed=seed, max_tokens=TEXT_LENGTH)
                self.engine.submit([Request(seed, PROMPT, sampling)])
                next_seed += 1
            for answer in self.engine.step():
                if answer.emission.done:
                    texts[answer.request.id] = answer.emission.tokens
        yield texts


def check(cell: Cell, places: int, preempted: float) -> None:
    served = Served(cell, places)
    result = fit(served.texts(SAMPLES), enumerate_texts(_model(cell.adapter), cell))
    assert result.samples == SAMPLES and result.good, f"{cell.name}: {result}"
    assert served.preempted > preempted and served.used == set(ways(cell)), served.preempted


@pytest.mark.parametrize(("cell", "places"), CELLS, ids=lambda value: getattr(value, "name", str(value)))
def test_texts_of_the_engine_follow_the_enumerated_distribution(cell: Cell, places: int) -> None:
    check(cell, places, SAMPLES / 50)


@pytest.mark.distribution
@pytest.mark.parametrize(("cell", "places"), ALL_CELLS, ids=lambda value: getattr(value, "name", str(value)))
def test_texts_of_the_engine_follow_the_enumerated_distribution_in_more_cells(cell: Cell, places: int) -> None:
    check(cell, places, SAMPLES / 100)
