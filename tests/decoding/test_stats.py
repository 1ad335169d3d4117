"""Statistics of a decoding: from the history of rounds by hand, and against the formulas of method.md 6.2."""

from functools import cache

import numpy as np
import pytest

from idlm_jax.decoding.generate import (
    DecodeStats,
    Emission,
    SamplingParams,
    generate_tokens,
    stats_from_history,
    total_stats,
)
from tests.decoding.helpers import drafting_model, make_policy, random_prompts

BATCH, LENGTH, STRIDE = 16, 216, 4


def stats(history: list[int], kept: int, stride: int = STRIDE) -> DecodeStats:
    return stats_from_history(np.array(history, np.int32), kept, stride)


def test_every_round_emits_its_accepted_drafts_and_one_token() -> None:
    ours = stats([-1, 3, 1, -1, 0], kept=1 + 4 + 2 + 1 + 1)
    assert (ours.tokens, ours.forwards, ours.cold_rounds) == (9, 5, 2)
    assert ours.emitted_by_round == (1, 4, 2, 1, 1)
    # Of three verifying rounds two accepted one draft at least, one two, one three.
    assert ours.accepted == (2, 1, 1)
    assert ours.acceptance == (2 / 3, 1 / 3, 1 / 3)
    assert ours.tokens_per_forward == 9 / 5
    assert ours.cold_share == 2 / 5


def test_the_round_that_an_end_cut_short_counts_as_one_forward() -> None:
    ours = stats([-1, 3, 3], kept=7)
    assert ours.emitted_by_round == (1, 4, 2)
    assert (ours.tokens, ours.forwards) == (7, 3)
    # Its drafts were accepted all the same.
    assert ours.accepted == (2, 2, 2)


def test_rounds_after_the_kept_tokens_do_not_count() -> None:
    ours = stats([-1, 3, -1, 2, 3], kept=5)
    assert ours == stats([-1, 3], kept=5)
    assert ours.emitted_by_round == (1, 4)


def test_ar_has_neither_drafts_nor_cold_rounds() -> None:
    ours = stats([-1, -1, -1, -1], kept=3, stride=1)
    assert (ours.tokens, ours.forwards, ours.cold_rounds, ours.accepted) == (3, 3, 0, ())
    assert (ours.acceptance, ours.tokens_per_forward, ours.cold_share) == ((), 1.0, 0.0)


def test_totals_are_the_statistics_of_all_rounds_together() -> None:
    parts = [stats([-1, 3, 0], kept=6), stats([-1, 1, 2], kept=6), stats([-1], kept=1)]
    total = total_stats(parts)
    assert (total.tokens, total.forwards, total.cold_rounds, total.accepted) == (13, 7, 3, (3, 2, 1))
    assert total.emitted_by_round == (1, 4, 1, 1, 2, 3, 1)
    assert total.acceptance == (3 / 4, 2 / 4, 1 / 4)


def test_nothing_kept_is_no_division_by_zero() -> None:
    ours = stats([-1, 2], kept=0)
    assert (ours.forwards, ours.tokens_per_forward, ours.cold_share) == (0, 0.0, 0.0)
    assert ours.acceptance == (0.0, 0.0, 0.0)


def test_only_cold_rounds_have_no_acceptance() -> None:
    assert stats([-1], kept=1).acceptance == (0.0, 0.0, 0.0)


@cache
def long_run(layout: str, coupling: str) -> list[Emission]:
    """BATCH sampled texts of LENGTH tokens each, at acceptances well inside (0, 1)."""
    sampling = [SamplingParams(1.0, seed=i, max_tokens=LENGTH, ignore_eos=True) for i in range(BATCH)]
    policy = make_policy(STRIDE, layout, coupling)
    return generate_tokens(drafting_model(), random_prompts(BATCH, seed=9), sampling, policy)


def counts(run: list[Emission]) -> tuple[int, int, int, np.ndarray]:
    """(tokens, forwards, verifying rounds, A_k: rounds that accepted the first k drafts) of all requests together."""
    each = [stats_from_history(emission.history, len(emission.tokens), STRIDE) for emission in run]
    tokens, forwards = sum(one.tokens for one in each), sum(one.forwards for one in each)
    warm = forwards - sum(one.cold_rounds for one in each)
    accepted = np.sum([one.accepted for one in each], axis=0)
    assert 0.1 < accepted[-1] / warm < accepted[0] / warm < 0.95
    return tokens, forwards, warm, accepted


RUNS = pytest.mark.parametrize(
    ("layout", "coupling"), [("standard", "gumbel"), ("branch", "gumbel"), ("standard", "ratio")], scope="module"
)


@RUNS
def test_tokens_are_forwards_plus_accepted_drafts(layout: str, coupling: str) -> None:
    """Exactly so, but for what the limit cut off the last round of each request."""
    run = long_run(layout, coupling)
    tokens, forwards, _, accepted = counts(run)
    cut = sum(int((np.maximum(emission.history, 0) + 1).sum()) - LENGTH for emission in run)
    assert 0 <= cut <= BATCH * (STRIDE - 1)
    assert tokens == BATCH * LENGTH == forwards + accepted.sum() - cut


@RUNS
def test_cold_rounds_are_the_first_and_in_the_standard_layout_those_after_a_rejection(
    layout: str, coupling: str
) -> None:
    for emission in long_run(layout, coupling):
        before, after = emission.history[:-1], emission.history[1:]
        assert emission.history[0] == -1
        rejected = (before >= 0) & (before < STRIDE - 1) & (layout == "standard")
        np.testing.assert_array_equal(after == -1, rejected)


@RUNS
def test_measured_tokens_per_forward_follow_the_formula(layout: str, coupling: str) -> None:
    """The formulas count whole cycles; a request adds one cold round at its start and cuts its last cycle short.

    Against its cycles a request thus has at most one forward more and N tokens more or less, so that the two ratios,
    both at most N, differ by no more than 2 N / forwards of one request.
    """
    tokens, forwards, warm, accepted = counts(long_run(layout, coupling))
    p = accepted / warm  # P_1 … P_{N-1}
    formula = (2 + p[:-1].sum()) / (2 - p[-1]) if layout == "standard" else 1 + p.sum()
    tolerance = 2 * STRIDE * BATCH / forwards
    assert tolerance < 0.12
    assert abs(tokens / forwards - formula) < tolerance
    # The other layout's formula is far off: the comparison can tell them apart.
    other = 1 + p.sum() if layout == "standard" else (2 + p[:-1].sum()) / (2 - p[-1])
    assert abs(tokens / forwards - other) > 2 * tolerance
