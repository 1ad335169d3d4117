"""Bytes and FLOPs of a decode step by hand, tables of measured steps, and what is predicted from them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.errors import UserError
from idlm_jax.evaluation.step_cost import Device, Shape, StepCosts, demand, read_costs

MODELS = Path(__file__).parents[2] / "configs" / "models"
BF16 = jnp.dtype(jnp.bfloat16)
DEVICE = Device("a device", 2e12, 500e12)
# Qwen3-8B: 8,190,735,360 parameters, of which an embedding of 151,936 × 4096 is looked up, not read.
READ_8B = 8_190_735_360 - 151_936 * 4096
LINE = {
    "device": "a device",
    "dtype": "bfloat16",
    "kernels": "auto",
    "bandwidth": 2e12,
    "peak": 500e12,
    "batch": 1,
    "rows": 7,
    "context": 1024,
    "rank": 0,
    "step": 0.008,
    "byte_floor": (2 * READ_8B + 1031 * 36 * 2 * 8 * 128 * 2) / 2e12,
}


def config(name: str) -> ModelConfig:
    return ModelConfig.from_hf(load_yaml(MODELS / f"{name}.yaml"))


def costs(measured: dict[Shape, float] | None = None) -> StepCosts:
    return StepCosts(config("qwen3-8b"), DEVICE, BF16, measured or {})


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_bytes_and_flops_are_those_counted_by_hand() -> None:
    keys = 1024 + 7
    moved, flops = demand(config("qwen3-8b"), Shape(3, 7, 1024), BF16)
    # Keys and values of 36 layers, 8 heads of 128, two bytes each; products of 32 query heads with keys and values.
    assert moved == 2 * READ_8B + 3 * keys * 36 * 2 * 8 * 128 * 2
    assert flops == 3 * 7 * (2 * READ_8B + 36 * 2 * 2 * 32 * 128 * keys)
    assert demand(config("qwen3-8b"), Shape(3, 7, 1024), jnp.dtype(jnp.float32))[0] == 2 * moved


def test_an_adapter_is_read_and_multiplied_too() -> None:
    # q and o 4096 × 4096, k and v 4096 × 1024, gate, up and down 4096 × 12288 in each of 36 layers.
    adapter = 128 * 36 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    plain, gated = (demand(config("qwen3-8b"), Shape(2, 7, 512, rank), BF16) for rank in (0, 128))
    assert gated[0] - plain[0] == 2 * adapter
    assert gated[1] - plain[1] == 2 * 7 * 2 * adapter


def test_a_tied_embedding_is_read_as_head() -> None:
    moved, _ = demand(config("smollm2-135m"), Shape(1, 1, 0), BF16)
    assert moved == 2 * 134_515_008 + 30 * 2 * 3 * 64 * 2


def test_without_measurements_a_step_takes_its_floor() -> None:
    memory, arithmetic = Shape(1, 1, 512), Shape(64, 16, 512)
    for shape, bound in ((memory, 0), (arithmetic, 1)):
        moved, flops = demand(config("qwen3-8b"), shape, BF16)
        assert costs().floors(shape) == (moved / 2e12, flops / 500e12)
        assert costs().predicted(shape) == pytest.approx(costs().floors(shape)[bound])
    assert costs().seconds(memory) == (costs().predicted(memory), False)


def test_a_measured_step_is_taken_as_it_is_and_others_follow_the_fit() -> None:
    given = [Shape(batch, rows, 1024) for batch in (1, 32, 64) for rows in (1, 7, 16)]
    truth = {shape: 1.1 * max(both) + 0.5 * min(both) for shape in given for both in [costs().floors(shape)]}
    fitted = costs(truth)
    assert fitted.fit(0) == pytest.approx((1.1, 0.5), abs=0.02)
    other = Shape(16, 9, 2048)
    assert fitted.predicted(other) == pytest.approx(
        1.1 * max(fitted.floors(other)) + 0.5 * min(fitted.floors(other)), rel=0.01
    )
    odd = costs(truth | {given[0]: 1.0})
    assert odd.seconds(given[0]) == (1.0, True) and not odd.seconds(other)[1]


def test_a_prediction_is_never_below_the_floor() -> None:
    fast = costs({Shape(batch, 7, 1024): 0.001 for batch in (1, 8, 64)})
    for shape in (Shape(1, 1, 512), Shape(64, 16, 4096)):
        assert fast.predicted(shape) >= max(fast.floors(shape))


def test_steps_bound_by_memory_alone_say_nothing_about_arithmetic() -> None:
    """A batch of one that is noisy by a percent must not decide what large batches cost."""
    shapes = [Shape(1, rows, 1024) for rows in (1, 7, 16)]
    noisy = {shape: 1.05 * max(costs().floors(shape)) * (1 + 0.01 * i) for i, shape in enumerate(shapes)}
    above, exposed = costs(noisy).fit(0)
    assert above == pytest.approx(1.06, abs=0.02) and exposed < 0.2


def test_an_adapter_has_a_fit_of_its_own_where_it_was_measured() -> None:
    plain, gated = Shape(1, 7, 1024), Shape(1, 7, 1024, 128)
    both = costs({plain: 1.1 * max(costs().floors(plain)), gated: 1.3 * max(costs().floors(gated))})
    assert (both.fit(0)[0], both.fit(128)[0]) == pytest.approx((1.1, 1.3), abs=0.01)
    assert both.fit(32) != (1.0, 0.0), "a rank that was not measured follows those that were"


def test_a_table_is_read_and_repeated_steps_count_by_their_median(tmp_path: Path) -> None:
    lines = [
        LINE | {"step": step, "bandwidth": rate} for step, rate in ((0.008, 2e12), (0.02, 2.2e12), (0.009, 2.4e12))
    ]
    lines.append(LINE | {"batch": 8, "rank": 128, "more": "is ignored"})
    table = read_costs(write(tmp_path / "costs.jsonl", *lines, ""))
    assert table.seconds == {Shape(1, 7, 1024): 0.009, Shape(8, 7, 1024, 128): 0.008}
    assert table.device == Device("a device", 2.1e12, 500e12)
    assert (table.dtype, table.kernels) == (BF16, "auto")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "has no lines"),
        (["6.04 ms"], r"costs.jsonl:1: not JSON"),
        ([LINE, "[1]"], r"costs.jsonl:2: not a JSON object"),
        ([{key: value for key, value in LINE.items() if key != "rows"}], "'rows' is missing"),
        ([LINE | {"step": 0}], "'step' cannot be 0"),
        ([LINE | {"step": "6.04"}], "'step' cannot be '6.04'"),
        ([json.dumps(LINE).replace("0.008", "NaN")], "'step' cannot be nan"),
        ([LINE | {"batch": 1.5}], "'batch' cannot be 1.5"),
        ([LINE | {"rows": True}], "'rows' cannot be True"),
        ([LINE | {"rank": -1}], "'rank' cannot be -1"),
        ([LINE | {"dtype": "int8"}], "'dtype' cannot be 'int8'"),
        ([LINE | {"device": 3}], "'device' cannot be 3"),
        ([LINE, LINE | {"device": "b"}], "steps of a device and b cannot be compared; keep those of one device"),
        ([LINE, LINE | {"kernels": "xla"}], "steps of auto and xla cannot be compared"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, lines: list[Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_costs(write(tmp_path / "costs.jsonl", *lines))


def test_a_missing_or_unreadable_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read_costs(tmp_path / "costs.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*: not text"):
        read_costs(tmp_path / "binary")


def test_the_table_of_another_model_is_refused(tmp_path: Path) -> None:
    table = read_costs(write(tmp_path / "costs.jsonl", LINE))
    assert StepCosts.of_table(config("qwen3-8b"), table).measured == table.seconds
    for other in (config("smollm2-135m"), replace(config("qwen3-8b"), num_hidden_layers=35)):
        with pytest.raises(UserError, match="the cost table is of another model: a step of batch 1 and 7 rows reads"):
            StepCosts.of_table(other, table)
