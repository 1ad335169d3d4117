"""The way to decode that is chosen is the fastest one, by what rounds cost and by how many drafts are accepted."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import window_rows
from idlm_jax.serving.stride import StrideChooser, candidates
from tests.decoding.helpers import AR, make_policy

STANDARD = {stride: make_policy(stride, "standard") for stride in (2, 3, 4)}
BRANCH = make_policy(4)
WAYS = candidates(BRANCH)
FREE = dict.fromkeys(WAYS, 1.0)
# Seconds a round of 8 requests, where nothing but arithmetic counts.
DEAR = {way: float(window_rows(way.layout, way.stride)) for way in WAYS}


def chooser(seconds: dict[Policy, float], requests: int = 8) -> StrideChooser:
    strides = StrideChooser(list(seconds))
    for way, cost in seconds.items():
        strides.measured(requests, way, cost)
    return strides


def outcomes(chances: Sequence[float], rounds: int, seed: int = 0) -> np.ndarray:
    """How many drafts rounds accept, each with the chance of its depth if those before it were."""
    right = np.random.default_rng(seed).random((rounds, len(chances))) < np.array(chances)
    return np.cumprod(right, axis=1).sum(axis=1)


def teach(strides: StrideChooser, chances: Sequence[float], policy: Policy = BRANCH, rounds: int = 20_000) -> None:
    for part in np.split(outcomes(chances[: policy.stride - 1], rounds), 100):
        strides.observe(policy, part)


def speed(way: Policy, seconds: float, chances: Sequence[float]) -> float:
    return way.layout.tokens_per_forward(np.cumprod(chances)[: way.stride - 1].tolist()) / seconds


def test_candidates_are_ar_and_all_that_a_stride_allows() -> None:
    assert candidates(BRANCH) == [make_policy(1, "standard"), *(STANDARD[n] for n in (4, 3, 2)), BRANCH]
    assert candidates(make_policy(4, "standard", "ratio", gated=False))[-1] == make_policy(4, "branch", "ratio", False)
    assert candidates(make_policy(1)) == [WAYS[0]]


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("a_row", [0.0, 0.01, 0.05, 0.2, 1.0], ids=lambda a: f"{a} a row")
def test_the_fastest_way_is_chosen(chance: float, a_row: float) -> None:
    seconds = {way: 1 + a_row * (window_rows(way.layout, way.stride) - 1) for way in WAYS}
    strides, chances = chooser(seconds), [chance] * 3
    teach(strides, chances)
    assert strides.acceptance == pytest.approx(np.cumprod(chances), abs=0.06)
    speeds = {way: speed(way, cost, chances) for way, cost in seconds.items()}
    assert speeds[strides.choose(8)] > 0.96 * max(speeds.values())
    if (chance == 0 and a_row) or a_row == 1:
        assert strides.choose(8).stride == 1
    if chance >= 0.6 and a_row == 0:
        assert strides.choose(8) == BRANCH


def test_each_number_of_requests_has_its_own_costs() -> None:
    strides = chooser(FREE, 1)
    for way, cost in DEAR.items():
        strides.measured(64, way, cost)
    teach(strides, [0.8] * 3)
    assert [strides.choose(requests) for requests in (1, 64, 1, 64)] == [BRANCH, WAYS[0], BRANCH, WAYS[0]]


def test_where_no_cost_is_known_and_where_there_is_one_way_the_first_is_taken() -> None:
    assert StrideChooser(WAYS).choose(4) == WAYS[0]
    for only in (BRANCH, AR):
        strides = StrideChooser([only])
        assert strides.choose(4) == only
        strides.measured(4, only, 1.0)
        strides.observe(only, np.array([0, -1]))
        assert strides.choose(4) == only


def test_a_way_that_is_as_fast_but_for_noise_is_not_switched_to() -> None:
    two, three = STANDARD[2], STANDARD[3]
    strides = chooser({AR: 1.0, three: 1.0, two: 1.0})
    teach(strides, [0.7] * 2, three)
    assert strides.choose(8) == three
    fast = speed(three, 1.0, [0.7] * 2)
    for share, chosen in ((1.02, three), (1.06, two), (1.02, two), (0.98, two), (0.9, three)):
        # ``two`` is so much faster than ``three``.
        strides.measured(8, two, speed(two, 1.0, [strides.acceptance[0]]) / (share * fast))
        strides.measured(8, three, speed(three, fast, np.array([strides.acceptance[0], strides._chance[1]])))
        assert strides.choose(8) == chosen, share


def test_rounds_that_verify_nothing_teach_nothing_and_unverified_depths_are_left_alone() -> None:
    strides = chooser(FREE)
    before = strides.acceptance
    strides.observe(BRANCH, np.full(4000, -1))
    strides.observe(AR, np.array([-1, 0, 0]))
    assert strides.acceptance == before == pytest.approx([0.8, 0.64, 0.512])
    teach(strides, [0.5], STANDARD[2])
    assert strides.acceptance == pytest.approx([0.5, 0.4, 0.32], abs=0.03)
    # What comes after a rejected draft says nothing about the chance of those after it.
    strides.observe(BRANCH, np.zeros(10_000, int))
    strides.observe(STANDARD[2], np.ones(10_000, int))
    assert strides.acceptance == pytest.approx([1, 0.8, 0.64], abs=0.01)


def test_what_was_seen_is_forgotten_by_half_in_so_many_rounds() -> None:
    strides = chooser(FREE)
    strides.observe(STANDARD[2], np.ones(20_000, int))
    strides.observe(STANDARD[2], np.zeros(512, int))
    assert strides.acceptance[0] == pytest.approx(0.5)
    strides.observe(STANDARD[2], np.zeros(512, int))
    assert strides.acceptance[0] == pytest.approx(0.25)


class Load:
    """Calls of 4 rounds of 8 requests by the way that is chosen; learns a call late, as the engine does."""

    def __init__(self, strides: StrideChooser, seconds: dict[Policy, float]):
        self.strides, self.seconds, self.rng = strides, seconds, np.random.default_rng(1)
        self.late: list[tuple[Policy, np.ndarray]] = []

    def run(self, calls: int, chances: Sequence[float]) -> tuple[float, list[Policy]]:
        """Tokens a second of a request, and the ways that were taken."""
        tokens, spent, taken = 0.0, 0.0, []
        for _ in range(calls):
            way = self.strides.choose(8)
            taken.append(way)
            spent += 4 * self.seconds[way]
            tokens += 4 * speed(way, 1.0, chances)
            count = 16 if way.stride > 1 else 0
            if len(self.late) == 2:
                self.strides.observe(*self.late.pop(0))
            self.late.append((way, outcomes(chances[: way.stride - 1], count, int(self.rng.integers(2**31)))))
        return tokens / spent, taken


@pytest.mark.parametrize("before", [0.02, 0.5])
def test_after_a_long_time_by_ar_or_by_short_strides_drafts_are_tried_again(before: float) -> None:
    seconds = {way: 1 + 0.1 * (window_rows(way.layout, way.stride) - 1) for way in WAYS}
    load = Load(chooser(seconds), seconds)
    _, taken = load.run(3000, [before, 0.1, 0.1])
    assert {way.stride for way in taken[300:400]} == ({1} if before < 0.1 else {2})
    # The texts have changed: now all drafts are right.
    _, taken = load.run(15_000, [0.99] * 3)
    assert taken[-1].stride == 4


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("a_row", [0.02, 0.1, 0.4, 1.0])
def test_trying_costs_little(chance: float, a_row: float) -> None:
    """In the long run, AR is never ahead by more than two percent, nor any other way by more than five."""
    seconds = {way: 1 + a_row * (window_rows(way.layout, way.stride) - 1) for way in WAYS}
    load, chances = Load(chooser(seconds), seconds), [chance] * 3
    load.run(200, chances)
    ours, _ = load.run(8000, chances)
    assert ours > 0.985
    assert ours > 0.95 * max(speed(way, cost, chances) for way, cost in seconds.items())


# Of rows of all requests: bound by memory, then by arithmetic, abruptly, by and by, or one after the other; the
# number at which both take as long.
CURVES: dict[str, Callable[[float], float]] = {
    "roofline": lambda x: max(1.0, x),
    "smooth": lambda x: (1 + x**4) ** 0.25,
    "sum": lambda x: 1 + x,
}


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("curve", CURVES)
def test_what_is_not_worth_measuring_is_never_missed(curve: str, stride: int) -> None:
    """The best of those that are measured has at least 93 % of the speed of the best of all.

    For any number of requests, costs that are 1 % off, and chances of the first draft and, of each further one, from 65
    to 100 % of the chance of the draft before it.
    """
    ways, rng = candidates(make_policy(stride)), np.random.default_rng(stride)
    counts, worst = [], 1.0
    for knee in np.geomspace(0.3, 1000, 40):
        seconds = {way: CURVES[curve](window_rows(way.layout, way.stride) / knee) for way in ways}
        strides = StrideChooser(ways)
        for way, cost in seconds.items():
            if strides.worth_measuring(8, way):
                strides.measured(8, way, cost * rng.uniform(0.99, 1.01))
        measured = strides._seconds[8]
        counts.append(len(measured))
        for _ in range(200):
            chances = rng.uniform(0, 1) * np.cumprod([1, *rng.uniform(0.65, 1, stride - 2)])[: stride - 1]
            speeds = {way: speed(way, cost, chances) for way, cost in seconds.items()}
            worst = min(worst, max(speeds[way] for way in measured) / max(speeds.values()))
    assert worst > 0.93, worst
    # It spares something: compiling is what makes a start take long.
    assert np.mean(counts) < len(ways) - 0.5 * (stride > 2), counts
