"""Tests of distributions: p-values are uniform where nothing differs, and small differences are found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from idlm_jax.evaluation.two_samples import (
    ENDED,
    against_null,
    compare_draws,
    compare_texts,
    count_cells,
    holm,
)


def draws(prefixes: int, count: int, seed: int, sharpness: float = 1.0) -> np.ndarray:
    """One token after each prefix, from peaked and from flat distributions over 400."""
    noise = np.random.default_rng(0).gumbel(size=(prefixes, 400)) * np.resize([1, 2, 4, 8], (prefixes, 1))
    p = np.exp(sharpness * (noise - noise.max(axis=1, keepdims=True)))
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(400, size=(count, 1), p=row / row.sum()) for row in p])


def texts(seed: int, sharpness: float = 1.0, longest: int = 60) -> np.ndarray:
    """[12, 20, 40] texts; some end before."""
    noise = np.random.default_rng(0).gumbel(size=(12, 200))
    p = np.exp(2 * sharpness * noise)
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.choice(200, size=(20, 40), p=row / row.sum()) for row in p])
    return np.where(np.arange(40) < rng.integers(20, longest, (12, 20, 1)), tokens, ENDED)


def uniform_p(p: list[float]) -> float:
    return float(stats.kstest(p, "uniform").pvalue)


def test_p_values_of_equal_distributions_are_uniform() -> None:
    rng, chi_square, variation, together = np.random.default_rng(1), [], [], []
    for seed in range(10):
        (view,) = compare_draws(draws(32, 256, seed), draws(32, 1024, 100 + seed), rng, 199)
        chi_square += [each.p for each in view.chi_square if each.null_std]
        variation += [each.p for each in view.total_variation if each.null_std]
        together += [view.all_chi_square.p, view.all_total_variation.p]
    assert uniform_p(chi_square) > 1e-3 and uniform_p(variation) > 1e-3
    assert min(holm(chi_square + variation + together)) > 0.01


def test_p_values_of_equal_texts_are_uniform() -> None:
    rng, found = np.random.default_rng(2), []
    for seed in range(25):
        surprisal = rng.normal(size=(2, 12, 20))
        results = compare_texts(texts(seed), texts(1000 + seed), (surprisal[0], surprisal[1]), rng, 99)
        found.append([outcome.p for outcome in results.values()])
    assert all(uniform_p(each) > 1e-3 for each in zip(*found, strict=True))


def test_slightly_sharper_draws_are_found_over_all_prefixes() -> None:
    (view,) = compare_draws(draws(32, 1024, 1, sharpness=1.1), draws(32, 4096, 2), np.random.default_rng(0))
    assert view.all_total_variation.p < 1e-6
    assert view.all_total_variation.excess > 5


def test_dependence_between_tokens_that_are_right_one_by_one_is_found_in_whole_texts() -> None:
    rng = np.random.default_rng(0)
    independent, same = rng.integers(0, 5, (4, 2048, 2)), np.repeat(rng.integers(0, 5, (4, 512, 1)), 2, axis=2)
    first, second, whole = compare_draws(same, independent, rng)
    assert min(holm([each.p for each in (*first.outcomes, *second.outcomes)])) > 0.01
    assert whole.all_chi_square.p < 1e-12


@pytest.mark.parametrize("change", [{"sharpness": 1.5}, {"longest": 40}])
def test_other_texts_are_found(change: dict) -> None:
    nothing = np.zeros((12, 20))
    results = compare_texts(texts(1, **change), texts(2), (nothing, nothing), np.random.default_rng(0))
    test = "length" if "longest" in change else "mmd"
    assert results[test].p < 1e-3
    assert results["surprisal"].p == 1


def test_rare_texts_share_cells_and_every_text_is_counted() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 10_000, (500, 2)), rng.integers(10_000, 20_000, (700, 2))
    a, b = count_cells(ours, theirs)
    assert a.sum() == 500 and b.sum() == 700 and len(a) == len(b) == 64
    assert 4 <= np.count_nonzero(a + b) <= 16


def test_cells_do_not_depend_on_who_wrote_what() -> None:
    rng = np.random.default_rng(0)
    pool = rng.geometric(0.1, (900, 1))
    parts = [count_cells(part[:300], part[300:]) for part in (pool, rng.permutation(pool))]
    np.testing.assert_array_equal(*[a + b for a, b in parts])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_follows_its_definition(p: list[float]) -> None:
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected, ordered = 0, sorted(p)
        while rejected < len(p) and ordered[rejected] * (len(p) - rejected) <= alpha:
            rejected += 1
        assert np.sum(adjusted <= alpha) == rejected


def test_a_statistic_that_no_exchange_changes_tells_nothing() -> None:
    assert against_null(0.0, np.zeros(50)).p == 1
