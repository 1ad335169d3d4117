"""TPF, OH and their ratio against published numbers, and speeds against numbers by hand."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from idlm_jax.cli.eval_acceptance import as_dict as acceptance_as_dict
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.errors import UserError
from idlm_jax.evaluation.acceptance import Acceptance, AcceptanceReport
from idlm_jax.evaluation.efficiency import AR, Analysis, Way, analyse, by_depth, read_acceptance
from idlm_jax.evaluation.efficiency_report import as_dict, explanation, grids
from idlm_jax.evaluation.reports import markdown
from idlm_jax.evaluation.step_cost import Device, Shape, StepCosts

CONFIG = ModelConfig.from_hf(load_yaml(Path(__file__).parents[2] / "configs" / "models" / "qwen3-8b.yaml"))
DEVICE = Device("a device", 2e12, 500e12)


def analysis(
    chances: tuple[float, ...], measured: dict[Shape, float], batches: tuple[int, ...] = (1,), **more: Any
) -> Analysis:
    costs = StepCosts(CONFIG, DEVICE, jnp.dtype(jnp.bfloat16), measured)
    return analyse("a model", costs, by_depth(chances), source="a test", batches=batches, context=1024, **more)


def way(stride: int, layout: str, chance: float) -> Way:
    ways = analysis((chance,) * (stride - 1), {}).ways
    return next(way for way in ways if (way.stride, way.layout) == (stride, layout))


@pytest.mark.parametrize(
    ("chance", "wanted"),
    [
        (0.5, {2: 1.33, 3: 1.43, 4: 1.47, 5: 1.48, 8: 1.50}),
        (0.7, {2: 1.54, 3: 1.79, 4: 1.93, 5: 2.01, 8: 2.12}),
        (0.8, {2: 1.67, 3: 2.06, 4: 2.31, 5: 2.49, 8: 2.77}),
        (0.85, {2: 1.74, 3: 2.23, 4: 2.58, 5: 2.83, 8: 3.29}),
        (0.9, {2: 1.82, 3: 2.44, 4: 2.92, 5: 3.30, 8: 4.09}),
        (0.95, {2: 1.90, 3: 2.69, 4: 3.37, 5: 3.97, 8: 5.40}),
    ],
)
def test_tokens_a_forward_are_those_of_the_method(chance: float, wanted: dict[int, float]) -> None:
    """method.md 6.2, worked out there for the paper's layout (2 / 1.05 rounds to 1.90, not to the 1.91 there)."""
    for stride, tokens in wanted.items():
        assert way(stride, "standard", chance).tokens_per_forward == pytest.approx(tokens, abs=0.0051)


@pytest.mark.parametrize(
    ("stride", "chance", "tokens"), [(2, 0.889, 1.8), (3, 0.909, 2.48), (4, 0.905, 2.96), (8, 0.896, 4.01)]
)
def test_tokens_a_forward_are_the_published_ones(stride: int, chance: float, tokens: float) -> None:
    """The paper's table 3, with the acceptance that it implies (method.md 6.4)."""
    assert way(stride, "standard", chance).tokens_per_forward == pytest.approx(tokens, abs=0.02)


def test_overhead_and_efficiency_are_those_of_the_method() -> None:
    """method.md 6.3: a query of 2N - 1 rows in every round, cold ones too; AR's numbers are 1."""
    official = way(4, "standard", 0.9)
    assert official.rows == 7 and official.overhead == pytest.approx(2.4, abs=0.005)
    assert official.efficiency == pytest.approx(1.217, abs=0.001)
    assert way(4, "standard", 0.85).efficiency == pytest.approx(0.949, abs=0.001)
    assert way(4, "standard", 1.0).efficiency == pytest.approx(16 / 7)
    assert way(4, "standard", 0.861).efficiency < 1 < way(4, "standard", 0.863).efficiency
    assert (AR.overhead, AR.efficiency, AR.name) == (1, 1, "AR")


def test_the_branch_layout_has_more_rows_and_no_cold_rounds() -> None:
    branch = way(4, "branch", 0.9)
    assert branch.rows == 16
    assert branch.tokens_per_forward == pytest.approx(1 + 0.9 + 0.81 + 0.729)
    assert branch.overhead == pytest.approx(16 / 3.439) and branch.efficiency == pytest.approx(3.439**2 / 16)


def test_speeds_are_those_by_hand() -> None:
    """N = 2 at acceptance .8: TPF 2 / (2 - .8) = 5/3 in 3 rows, 1.8 in 4 rows."""
    measured = {
        Shape(2, 1, 1024): 0.010,
        Shape(2, 3, 1024): 0.012,
        Shape(2, 4, 1024): 0.015,
        # Not ours: another context, another adapter.
        Shape(2, 3, 512): 1.0,
        Shape(2, 3, 1024, 8): 1.0,
    }
    ar, standard, branch = analysis((0.8,), measured, (2,)).points
    assert (ar.speed_up, ar.per_request, ar.total) == pytest.approx((1, 100, 200))
    assert standard.step_ratio == pytest.approx(1.2) and standard.speed_up == pytest.approx(5 / 3 / 1.2)
    assert standard.per_request == pytest.approx(5 / 3 / 0.012) and standard.total == pytest.approx(10 / 3 / 0.012)
    assert branch.speed_up == pytest.approx(1.8 / 1.5)
    assert ar.measured and standard.measured and branch.measured


def test_the_best_way_changes_with_the_batch_and_may_be_ar() -> None:
    steps = {1: (0.010, 0.010, 0.010), 8: (0.010, 0.012, 0.015), 64: (0.010, 0.030, 0.040)}
    measured = {
        Shape(batch, rows, 1024): seconds
        for batch, times in steps.items()
        for rows, seconds in zip((1, 3, 4), times, strict=True)
    }
    found = analysis((0.8,), measured, (64, 1, 8, 8))
    assert found.batches == (1, 8, 64)
    assert [found.best(batch).way.name for batch in found.batches] == ["N = 2, branch", "N = 2, standard", "AR"]


def test_an_adapter_slows_drafting_alone() -> None:
    measured = {
        Shape(1, 1, 1024): 0.01,
        Shape(1, 1, 1024, 128): 9.0,
        Shape(1, 3, 1024): 9.0,
        Shape(1, 3, 1024, 128): 0.02,
    }
    ar, standard, _ = analysis((0.8,), measured, rank=128).points
    assert (ar.seconds, standard.seconds) == (0.01, 0.02)


def test_what_rests_on_a_prediction_is_marked() -> None:
    found = analysis((0.8,), {Shape(1, 3, 1024): 0.012})
    ar, standard, _ = found.points
    assert not ar.measured and standard.step_measured and not standard.measured
    ways, steps, best, checks = grids(found)
    assert ways.rows[0][-1].startswith("≈"), "a speed-up over a predicted step"
    assert [row[-1][0] == "≈" for row in steps.rows] == [True, False, True]
    assert best.rows[0][2].startswith("≈") and len(checks.rows) == 1
    (no_checks,) = [analysis((0.8,), {})]
    assert len(grids(no_checks)) == 3 and "No step was measured" in explanation(no_checks)


def test_markdown_has_every_table_in_full() -> None:
    found = analysis((0.8, 0.7), {Shape(1, 3, 1024): 0.012}, (1, 4))
    lines = markdown(grids(found)).splitlines()
    for grid in grids(found):
        assert f"{grid.title}:" in lines
        assert all(f"| {' | '.join(cells)} |" in lines for cells in (grid.header, *grid.rows))
        assert all(len(row) == len(grid.header) for row in grid.rows)


def test_json_has_the_same_numbers_and_no_other_type() -> None:
    found = analysis((0.8, 0.7), {Shape(1, 1, 1024): 0.01, Shape(1, 3, 1024): 0.012}, (1, 4))
    values = json.loads(json.dumps(as_dict(found), allow_nan=False))
    assert [way["tokens_per_forward"] for way in values["ways"]] == [way.tokens_per_forward for way in found.ways]
    assert [point["speed_up"] for point in values["points"]] == [point.speed_up for point in found.points]
    assert [point["measured"] for point in values["points"]] == [point.step_measured for point in found.points]
    assert values["best"]["4"]["speed_up"] == found.best(4).speed_up
    assert [step["measured"] for step in values["steps"]] == [0.01, 0.012]


def test_acceptance_by_depth_multiplies() -> None:
    assert by_depth((0.5, 0.4, 0.25)).prefix == pytest.approx((0.5, 0.2, 0.05))
    for bad in ((), (1.5,), (-0.1,), (math.nan,), (0.5,) * 16):
        with pytest.raises(UserError, match="--acceptance"):
            by_depth(bad)


def test_a_report_is_read_as_it_was_printed(tmp_path: Path) -> None:
    sampled, greedy = Acceptance(1.0, (0.5, 0.4), (0.5, 0.3)), Acceptance(0.0, (0.6, 0.5), (0.6, 0.4))
    path = tmp_path / "report.json"
    path.write_text(json.dumps(acceptance_as_dict(AcceptanceReport((sampled, greedy), 1.0, math.e, 20, 10))))
    assert read_acceptance(path) == read_acceptance(path, 1.0) == sampled
    assert read_acceptance(path, 0.0) == greedy
    with pytest.raises(UserError, match=r"has no temperature 0.7 \(it has 1, 0; 0 is greedy\)"):
        read_acceptance(path, 0.7)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"temperatures": []}',
        '{"temperatures": 3}',
        '{"temperatures": [{"temperature": 1, "by_depth": [0.5]}]}',
        '{"temperatures": [{"temperature": "hot", "by_depth": [0.5], "prefix": [0.5]}]}',
        '{"temperatures": [{"temperature": 1, "by_depth": [0.5], "prefix": ["0.5"]}]}',
        '{"temperatures": [{"temperature": 1, "by_depth": [0.5], "prefix": [1.5]}]}',
        '{"temperatures": [{"temperature": 1, "by_depth": [], "prefix": []}]}',
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"report\.json"):
        read_acceptance(path)
