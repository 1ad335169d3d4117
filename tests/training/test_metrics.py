"""Numbers of a run: the file, what is shown, the curves, speed, and FLOPs counted by hand."""

import importlib.util
import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from idlm_jax.config import ModelConfig, RopeConfig
from idlm_jax.errors import UserError
from idlm_jax.training import metrics
from idlm_jax.training.metrics import (
    RunLog,
    Throughput,
    document_tokens,
    peak_flops,
    plot,
    read_metrics,
    useful_flops,
)
from tests.training.limits import files_limited_to
from tests.training.support import random_batch


def write(output: Path, steps: range, total: int = 100, resume: int = 0, **values: Any) -> None:
    with RunLog(output, total_steps=total, resume_step=resume) as log:
        for step in steps:
            log.log(step, {"loss": 1 / step, "learning_rate": 0.1} | values)


def test_every_step_is_a_line_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=3) as log:
        log.log(1, {"loss": 0.5, "acceptance": [0.25, 0.125]})
        (entry,) = read_metrics(tmp_path)
        assert entry.pop("time") > 1e9
        assert entry == {"step": 1, "loss": 0.5, "acceptance": [0.25, 0.125]}


def test_losses_are_written_without_rounding(tmp_path: Path) -> None:
    loss = float(np.float32(0.1) / np.float32(3))
    write(tmp_path, range(1, 2), loss=loss)
    assert read_metrics(tmp_path)[0]["loss"] == loss


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), loss=math.nan, acceptance=[math.inf, 0.5])
    entry = json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=pytest.fail)
    assert entry["loss"] is None and entry["acceptance"] == [None, 0.5]


def test_a_resume_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    # The kill came in the middle of a line.
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    write(tmp_path, range(6, 9), resume=5)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    write(tmp_path, range(1, 3))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, total_steps=10**6) as log:
        log.log(1, {"loss": 0.5})
        size = (tmp_path / metrics.FILE).stat().st_size
        capsys.readouterr()
        # Room for a part of a line.
        with files_limited_to(size + 10):
            log.log(2, {"loss": 0.5})
            log.log(3, {"loss": 0.5})
        log.log(4, {"loss": 0.5})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("cannot write ") and first.endswith("training goes on")
    assert second.endswith("metrics.jsonl is written again; 2 steps are missing")
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 4]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}'])
def test_a_file_of_something_else_is_one_line_and_stays(tmp_path: Path, line: str) -> None:
    (tmp_path / metrics.FILE).write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not an entry"):
        RunLog(tmp_path, total_steps=1)
    assert (tmp_path / metrics.FILE).read_text().endswith(f"{line}\n")


def test_only_process_0_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, total_steps=1, process_index=1) as log:
        log.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_off_a_terminal_there_are_about_twenty_lines_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    write(tmp_path, range(1, 1001), total=1000)
    lines = capsys.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("step 1/1000: loss 1.0000") and lines[-1].startswith("step 1000/1000: ")


def test_off_a_terminal_slow_steps_are_shown_twice_a_minute_or_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    with RunLog(tmp_path, total_steps=10_000) as log:
        for step in range(1, 9):
            # The first step is compiled.
            clock(10 if step > 1 else 1000)
            log.log(step, {"loss": 1.0, "tokens_per_second": 1234.5, "acceptance": [0.5, 0.25] if step == 1 else []})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 4", "step 7"]
    assert lines[-1] == ("step 7/10000: loss 1.0000, tokens/s 1,234, acceptance 0.50/0.25, 27:45:30 left")


def test_on_a_terminal_there_is_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # Room for all of it, however fast the steps: tqdm cuts what does not fit.
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "40")
    with RunLog(tmp_path, total_steps=10, resume_step=4) as log:
        for step in range(5, 11):
            log.log(step, {"loss": 0.5, "acceptance": [0.25]})
    error = capsys.readouterr().err
    assert "\n" not in error.rstrip("\n")
    assert "10/10" in error and "loss=0.5000" in error and "acceptance=0.25" in error


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    with RunLog(tmp_path, total_steps=1, tensorboard=True) as log:
        log.log(1, {"loss": 0.5, "acceptance": [0.25, math.nan, 0.125]})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, scalars = file.read_bytes(), {}
    while content:
        # A TFRecord: length, its checksum, the event, its checksum.
        (size,) = struct.unpack_from("<Q", content)
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        content = content[16 + size :]
    assert scalars == {("loss", 1): 0.5, ("acceptance/1", 1): 0.25, ("acceptance/3", 1): 0.125}


def test_missing_packages_are_one_line_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    for missing, extra in (("matplotlib", "train"), ("tensorboardX", "tensorboard")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else found(name)
        )
        with pytest.raises(UserError, match=rf"needs {missing}: pip install 'idlm-jax\[{extra}\]'"):
            RunLog(tmp_path, total_steps=1, tensorboard=True)


def test_the_curves_are_an_image_that_changes_with_the_numbers(tmp_path: Path) -> None:
    images = []
    for scale in (1.0, 0.5):
        with RunLog(tmp_path, total_steps=60) as log:
            for step in range(1, 61):
                values: dict[str, Any] = {
                    "loss_noisy": scale / step,
                    "loss_clean": 0.1,
                    "learning_rate": 1e-3,
                    "block_size": 1 + step // 30,
                }
                if step % 20 == 0:
                    values["acceptance"] = [0.5] * (1 + step // 30)
                log.log(step, values)
        path = plot(tmp_path)
        assert path == tmp_path / "loss_curve.png"
        images.append(imread(path))
    assert images[0].shape[0] > 500 and images[0].shape[1] > 900
    assert (images[0] != images[1]).any()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss_curve.png", "metrics.jsonl"]


def test_a_run_of_one_step_and_numbers_that_are_none_can_be_drawn(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), loss_noisy=math.nan, loss_clean=0.0, acceptance=[math.nan])
    assert plot(tmp_path) is not None


def test_without_steps_nothing_is_drawn(tmp_path: Path) -> None:
    assert plot(tmp_path) is None
    write(tmp_path, range(0))
    assert plot(tmp_path) is None


def test_speed_is_that_of_the_median_step(monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1000.0)
    throughput = Throughput(devices=2)
    assert "tokens_per_second" not in throughput.step(100, 600.0)
    # The third step waits for a measurement.
    for seconds in (2.0, 2.0, 50.0, 2.0):
        clock(seconds)
        values = throughput.step(100, 600.0)
        assert values["step_seconds"] == seconds
        assert values["tokens_per_second"] == 50.0
        assert values["mfu"] == pytest.approx(600 / 2 / 2000)


def test_an_unknown_device_has_no_mfu(clock: Callable[[float], None]) -> None:
    throughput = Throughput(devices=1)
    throughput.step(1, 1.0)
    clock(1.0)
    assert throughput.step(1, 1.0).keys() <= {"step_seconds", "tokens_per_second", "peak_memory_bytes"}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind: str, peak: float | None) -> None:
    device: Any = SimpleNamespace(device_kind=kind)
    assert peak_flops(device) == peak


def test_document_length_gives_the_pairs_that_causal_attention_sees() -> None:
    batch = random_batch(3, 40, 50)
    segments, positions = np.asarray(batch.segment_ids), np.asarray(batch.positions)
    tokens, length = document_tokens(segments, positions)
    pairs = sum(
        int(segments[row, q] == segments[row, k] > 0) for row in range(3) for q in range(40) for k in range(q + 1)
    )
    assert tokens == (segments > 0).sum()
    assert tokens * (length + 1) / 2 == pytest.approx(pairs)
    assert document_tokens(np.zeros((1, 4)), np.zeros((1, 4))) == (0, 0.0)


# One layer of D 8, F 12, 2 query heads and 1 key head of 4, V 20: q 8·8, k and v 8·4 each, o 8·8, three of 8·12.
MODEL = ModelConfig("llama", 20, 8, 12, 1, 2, 1, 4, 1e-5, RopeConfig(), True, 64, False, False, False)
WEIGHTS = 64 + 32 + 32 + 64 + 3 * 96
HEAD = 8 * 20
# Queries and keys, and weights and values: 2 FLOPs for each of 2 heads · 4, twice.
PAIR = 2 * 2 * (2 * 4)
# 10 tokens of a document of 7: 40 pairs; 6 noisy rows see 4 keys each as well.
COUNTS: dict[str, Any] = {"tokens": 10, "noisy_rows": 6, "clean_rows": 5, "length": 7, "block_size": 3}


def test_flops_of_plain_and_full_training_by_hand() -> None:
    assert useful_flops(MODEL, "ar", **COUNTS) == 3 * (2 * WEIGHTS * 10 + PAIR * 40 + 2 * HEAD * 5)
    assert useful_flops(MODEL, "full", **COUNTS) == 3 * (2 * WEIGHTS * 16 + PAIR * 64 + 2 * HEAD * 11)
    # The soft targets are logits that the clean loss needs anyway.
    assert useful_flops(MODEL, "full", **COUNTS, soft=True) == useful_flops(MODEL, "full", **COUNTS)


def test_flops_of_lora_by_hand() -> None:
    # Rank 2 on q (8 + 8) and down (12 + 8).
    adapter = {"rank": 2, "target_modules": ("q_proj", "down_proj")}
    lora = 2 * (16 + 20)
    expected = 16 * 2 * (2 * WEIGHTS + 3 * lora) + 3 * PAIR * 64 + 2 * 2 * HEAD * 11
    assert useful_flops(MODEL, "lora", **COUNTS, **adapter) == expected


def test_flops_of_a_gated_lora_by_hand() -> None:
    adapter = {"rank": 2, "target_modules": ("q_proj", "down_proj")}
    lora = 2 * (16 + 20)
    clean = 10 * 2 * WEIGHTS + PAIR * 40
    # Forward and for the queries 24 pairs each; keys and values get gradients in the group, 2 pairs a row.
    noisy = 6 * 2 * (2 * WEIGHTS + 3 * lora) + PAIR * (24 + 24 + 12)
    assert useful_flops(MODEL, "gated-lora", **COUNTS, **adapter) == clean + noisy + 2 * 2 * HEAD * 6
    assert useful_flops(MODEL, "gated-lora", **COUNTS, **adapter, soft=True) == clean + noisy + 3 * 2 * HEAD * 6


def test_all_projections_have_an_adapter_unless_said_otherwise() -> None:
    with_all = useful_flops(MODEL, "lora", **COUNTS, rank=1)
    assert with_all - useful_flops(MODEL, "lora", **COUNTS) == 16 * 3 * 2 * (16 + 12 + 12 + 16 + 3 * 20)
