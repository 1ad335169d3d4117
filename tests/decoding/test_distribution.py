"""ISD samples follow AR's distribution exactly, by enumeration of every text of a tiny model; the official rule fails.

A pairwise-covering subset of the ways to decode runs always; ``pytest -m distribution`` runs all of them
(``scripts/distribution_table.py`` prints them as a table).
"""

from functools import cache

import pytest

from idlm_jax.backbone.qwen3 import Qwen3
from tests.decoding.support import (
    ALL_CELLS,
    Cell,
    OfficialCoupling,
    enumerate_texts,
    fit,
    fit_and_confirm,
    pairwise_cells,
    sample_texts,
    tiny_model,
)

SAMPLES = 200_000


@cache
def _model(adapter: bool) -> Qwen3:
    return tiny_model(adapter=adapter)


@pytest.mark.parametrize("cell", pairwise_cells(), ids=lambda cell: cell.name)
def test_samples_follow_the_enumerated_distribution_of_ar(cell: Cell) -> None:
    model = _model(cell.adapter)
    result = fit(sample_texts(model, cell, SAMPLES), enumerate_texts(model, cell))
    assert result.samples >= SAMPLES
    assert result.good, f"{cell.name}: {result}"


@pytest.mark.distribution
@pytest.mark.parametrize("cell", ALL_CELLS, ids=lambda cell: cell.name)
def test_samples_follow_the_enumerated_distribution_of_ar_in_every_cell(cell: Cell) -> None:
    fits = fit_and_confirm(_model(cell.adapter), cell, SAMPLES)
    assert fits[-1].good, f"{cell.name}: {fits}"


def test_pairwise_cells_cover_every_pair_of_levels() -> None:
    def pairs(cells: list[Cell]) -> set:
        rows = [tuple(vars(cell).items()) for cell in cells]
        return {(a, b) for row in rows for i, a in enumerate(row) for b in row[i + 1 :]}

    assert pairs(pairwise_cells()) == pairs(ALL_CELLS)


@pytest.mark.parametrize("layout", ["standard", "branch"])
def test_the_official_rule_fails_the_same_check(layout: str) -> None:
    cell = Cell(3, layout, "ratio", 1.0, 0, 1.0, False)
    model = _model(False)
    result = fit(sample_texts(model, cell, SAMPLES // 10, OfficialCoupling()), enumerate_texts(model, cell))
    assert not result.good
    assert result.excess > 30
    assert result.chi_square_p < 1e-12
