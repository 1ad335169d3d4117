"""Do two samples of texts follow one distribution? Distances between them, each against its permutation null.

If they do, who wrote a text is a label that may be exchanged between texts of one prompt: exchanging labels at random
gives the null distribution of any statistic, whatever the texts are like. Every statistic here is a distance, not
negative and larger the more the samples differ, so that one rule serves all: the p-value is the upper tail of the gamma
distribution with the mean and variance of the null. (Under the null a chi-square or a squared difference of means is
gamma distributed, and few permutations then give p-values small enough to survive Holm's correction.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt
from scipy import sparse, stats

# Cells of a chi-square; a quarter of them share the rare texts.
CELLS = 64
# A text seen less often, in both samples together, is rare: alone in a cell it would make the tail of a null irregular.
COMMON = 16
PERMUTATIONS = 499
# Buckets of hashed n-grams for each n, and random features of the kernel of n-gram profiles.
BUCKETS, FEATURES = 1024, 1024
ORDERS = (1, 2, 3)
# What stands where a text has ended.
ENDED = -1


@dataclass(frozen=True)
class Outcome:
    """A distance between two samples beside what chance alone gives."""

    value: float
    null_mean: float
    null_std: float
    p: float

    @property
    def excess(self) -> float:
        """The distance above its null, in standard deviations."""
        return (self.value - self.null_mean) / self.null_std if self.null_std else 0.0


def against_null(value: float, null: Float[np.ndarray, " R"]) -> Outcome:
    """One statistic against its values under permutation."""
    mean, variance = float(np.mean(null)), float(np.var(null, ddof=1))
    if variance == 0:  # nothing to exchange: all texts are equal
        return Outcome(float(value), mean, 0.0, 1.0)
    p = float(stats.gamma.sf(value, mean**2 / variance, scale=variance / mean))
    return Outcome(float(value), mean, variance**0.5, p)


def holm(p_values: Sequence[float] | Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's adjusted p-values: rejecting those below α errs anywhere with probability at most α."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def count_cells(
    ours: Int[np.ndarray, "n K"], theirs: Int[np.ndarray, "m K"], cells: int = CELLS
) -> tuple[Int[np.ndarray, " cells"], Int[np.ndarray, " cells"]]:
    """Both samples of short texts counted in the same cells.

    The texts that are most common in both together have a cell each; the rare ones are hashed into a quarter of the
    cells, so that a sample which writes other rare texts is still seen. Who wrote what plays no part in the choice.
    """
    texts, inverse, counts = np.unique(np.concatenate([ours, theirs]), axis=0, return_inverse=True, return_counts=True)
    own = np.argsort(-counts, kind="stable")[: cells - cells // 4]
    own = own[counts[own] >= COMMON]
    shared = int(np.clip((counts.sum() - counts[own].sum()) // (2 * COMMON), 1, cells // 4))
    cell = (len(own) + _hash(texts) % shared).astype(np.int64)
    cell[own] = np.arange(len(own))
    where = cell[inverse.reshape(-1)]
    return np.bincount(where[: len(ours)], minlength=cells), np.bincount(where[len(ours) :], minlength=cells)


@dataclass(frozen=True)
class DrawComparison:
    """One view of the draws (the token at one depth, or the whole text), prefix by prefix and over all prefixes."""

    view: str
    chi_square: tuple[Outcome, ...]
    total_variation: tuple[Outcome, ...]
    # Summed over prefixes; the total variation averaged.
    all_chi_square: Outcome
    all_total_variation: Outcome

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Every test of this view."""
        return (*self.chi_square, *self.total_variation, self.all_chi_square, self.all_total_variation)


def compare_draws(
    ours: Int[np.ndarray, "P n K"],
    theirs: Int[np.ndarray, "P m K"],
    rng: np.random.Generator,
    permutations: int = PERMUTATIONS,
) -> list[DrawComparison]:
    """Compare short texts drawn after each of P prefixes: the token at every depth, then whole texts.

    The token at depth k shows a wrong rule for drafts of depth k - 1 even where earlier ones are right, and whole texts
    show a wrong dependence between tokens that are right one by one.
    """
    depths = range(ours.shape[2])
    views = {f"token {k + 1}": slice(k, k + 1) for k in depths}
    if len(depths) > 1:
        views["text"] = slice(0, None)
    return [_compare_view(view, ours[:, :, at], theirs[:, :, at], rng, permutations) for view, at in views.items()]


def _compare_view(
    view: str, ours: np.ndarray, theirs: np.ndarray, rng: np.random.Generator, permutations: int
) -> DrawComparison:
    values, nulls = [], []
    for one, other in zip(ours, theirs, strict=True):
        a, b = count_cells(one, other)
        total = a + b
        # Exchanging labels at random: the permuted counts are hypergeometric.
        permuted = rng.multivariate_hypergeometric(total, int(a.sum()), size=permutations, method="marginals")
        distances = _distances(np.concatenate([a[None], permuted]), total)
        values.append(distances[:, 0])
        nulls.append(distances[:, 1:])
    every = [[against_null(v, n) for v, n in zip(*pair, strict=True)] for pair in zip(values, nulls, strict=True)]
    chi_square, total_variation = zip(*every, strict=True)
    return DrawComparison(
        view,
        chi_square,
        total_variation,
        against_null(sum(v[0] for v in values), np.sum([n[0] for n in nulls], axis=0)),
        against_null(np.mean([v[1] for v in values]), np.mean([n[1] for n in nulls], axis=0)),
    )


def _distances(a: Int[np.ndarray, "R cells"], total: Int[np.ndarray, " cells"]) -> Float[np.ndarray, "2 R"]:
    """Chi-square of homogeneity and total variation of counts ``a`` and ``total - a``."""
    a, total = a[:, total > 0].astype(np.float64), total[total > 0]
    b = total - a
    n, m = a[0].sum(), b[0].sum()
    chi_square = np.sum((a * np.sqrt(m / n) - b * np.sqrt(n / m)) ** 2 / total, axis=1)
    return np.stack([chi_square, np.abs(a / n - b / m).sum(axis=1) / 2])


def compare_texts(
    ours: Int[np.ndarray, "P n L"],
    theirs: Int[np.ndarray, "P m L"],
    surprisal: tuple[Float[np.ndarray, "P n"], Float[np.ndarray, "P m"]],
    rng: np.random.Generator,
    permutations: int = PERMUTATIONS,
) -> dict[str, Outcome]:
    """Compare whole continuations of P prompts; tokens after a text's end are ENDED.

    ``mmd`` is the maximum mean discrepancy of n-gram profiles (n = 1, 2, 3) under a Gaussian kernel, squared; the
    others compare one thing each: lengths, how many texts ended, what a model thinks of them (``surprisal``, −log p a
    token), the entropy of tokens, and the n-grams used (total variation of hashed counts).
    """
    texts = np.concatenate([ours, theirs], axis=1)
    labels = _permuted_labels(len(texts), ours.shape[1], theirs.shape[1], rng, permutations)
    flat = texts.reshape(-1, texts.shape[2])
    lengths = np.sum(flat != ENDED, axis=1)
    scalars = {
        "length": lengths,
        "ended": lengths < texts.shape[2],
        "surprisal": np.concatenate(surprisal, axis=1).reshape(-1),
    }
    counts = {n: _ngram_counts(flat, n) for n in ORDERS}
    distances = {"mmd": _squared_gap(_profile_features(counts, rng), labels)}
    for name, values in scalars.items():
        distances[name] = _squared_gap(values[:, None].astype(np.float64), labels)
    shares = {n: _label_shares(count, labels) for n, count in counts.items()}
    entropy_a, entropy_b = (-np.sum(_x_log_x(share), axis=1) for share in shares[1])
    distances["entropy"] = (entropy_a - entropy_b) ** 2
    for n, (a, b) in shares.items():
        distances[f"{n}-grams"] = np.abs(a - b).sum(axis=1) / 2
    return {name: against_null(values[0], values[1:]) for name, values in distances.items()}


def _x_log_x(p: Float[np.ndarray, "R F"]) -> Float[np.ndarray, "R F"]:
    """p log p, 0 at 0."""
    return p * np.log(np.where(p > 0, p, 1))


def _permuted_labels(
    prompts: int, ours: int, theirs: int, rng: np.random.Generator, permutations: int
) -> Float[np.ndarray, "R texts"]:
    """1 for a text of ours: as it is in the first row, exchanged within every prompt in the others."""
    own = np.repeat([1.0, 0.0], [ours, theirs])
    rows = np.broadcast_to(own, (permutations + 1, prompts, ours + theirs)).copy()
    rng.permuted(rows[1:], axis=2, out=rows[1:])
    return rows.reshape(permutations + 1, -1)


def _squared_gap(features: Float[np.ndarray, "texts F"], labels: Float[np.ndarray, "R texts"]) -> np.ndarray:
    """Squared distance between the means of both samples, for every labelling."""
    count = labels[0].sum()
    sums = labels @ features
    return np.sum((sums / count - (features.sum(axis=0) - sums) / (len(features) - count)) ** 2, axis=1)


def _label_shares(counts: sparse.csr_matrix, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each bucket in the n-grams of either sample, for every labelling."""
    a = (counts.T @ labels.T).T
    b = np.asarray(counts.sum(axis=0)).reshape(-1) - a
    return a / a.sum(axis=1, keepdims=True), b / b.sum(axis=1, keepdims=True)


def _ngram_counts(texts: Int[np.ndarray, "texts L"], n: int) -> sparse.csr_matrix:
    """How often each text has the n-grams of each bucket."""
    grams = np.lib.stride_tricks.sliding_window_view(texts, n, axis=1)
    text, place = np.nonzero(np.all(grams != ENDED, axis=2))
    bucket = (_hash(grams[text, place]) % BUCKETS).astype(np.int64)
    ones = np.ones(len(text))
    return sparse.csr_matrix((ones, (text, bucket)), shape=(len(texts), BUCKETS))  # equal entries add up


def _profile_features(
    counts: dict[int, sparse.csr_matrix], rng: np.random.Generator
) -> Float[np.ndarray, "texts FEATURES"]:
    """Random Fourier features of a Gaussian kernel on n-gram profiles of unit length, as wide as profiles differ."""
    profiles = sparse.hstack([_unit_rows(count) for count in counts.values()]).tocsr()
    width = np.sqrt(len(counts))  # two texts without a common n-gram are √2 times this apart
    directions = rng.standard_normal((BUCKETS * len(counts), FEATURES)) / width
    phases = rng.uniform(0, 2 * np.pi, FEATURES)
    return np.cos(profiles @ directions + phases) * np.sqrt(2 / FEATURES)


def _unit_rows(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).reshape(-1))
    return sparse.diags(1 / np.maximum(norms, 1)) @ counts


def _hash(texts: Int[np.ndarray, "texts K"]) -> UInt[np.ndarray, " texts"]:
    """A number for each row of tokens, the same in every run."""
    value = np.full(len(texts), 0x9E3779B97F4A7C15, np.uint64)
    for column in texts.T.astype(np.uint64):
        value = (value ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(29)
    return value
