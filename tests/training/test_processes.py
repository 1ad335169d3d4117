"""Two processes train as one, stop together when one is told to, and one goes on where two were killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from idlm_jax.training.metrics import read_metrics
from tests.training.runs import ROOT, make_store, write_settings

STEPS = 18
CHANGES = {
    "stages": [{"steps": STEPS, "block_size": 2, "noisy_loss": "kl"}],
    "evaluation": {"documents": 8, "every": 6},
    "checkpoint": {"every": 3},
    "mesh": {"data": 1, "fsdp": 2, "tp": 1},
    "accumulation": 2,
}


def start(settings: Path, rank: int, count: int, port: int, *more: str) -> subprocess.Popen[str]:
    """`idlm train` as one of ``count`` processes, which have two devices together."""
    command = [sys.executable, "-m", "idlm_jax.cli.main", "train", str(settings), *more]
    if count > 1:
        command += ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id", str(rank)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(2 // count),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start_all(settings: Path, count: int, *more: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(settings, rank, count, port, *more) for rank in range(count)]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and what was written on stderr."""
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def wait_for_step(output: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Until the run has a whole checkpoint of at least this step."""
    deadline = time.monotonic() + 240
    while not any((output / "checkpoints").glob(f"{step}/checksums.json")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), "no checkpoint"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by one process that has both devices."""
    folder = tmp_path_factory.mktemp("alone")
    settings = write_settings(folder / "run.yaml", store, folder / "run", **CHANGES)
    assert [code for code, _ in finish(start_all(settings, 1))] == [0]
    return folder / "run"


def assert_same_run(output: Path, alone: Path) -> None:
    ours, theirs = (read_metrics(path) for path in (output, alone))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in ("tokens", "noisy_rows", "clean_rows"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([row[name] for row in ours], [row[name] for row in theirs], rtol=2e-4)
    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (output, alone))
    for name in b:
        np.testing.assert_allclose(a[name], b[name], atol=2e-4)


def test_two_processes_stop_together_go_on_are_killed_and_one_does_the_rest_as_if_nothing_had_happened(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    settings = write_settings(tmp_path / "run.yaml", store, tmp_path / "run", **CHANGES)
    pair = start_all(settings, 2)
    wait_for_step(tmp_path / "run", 3, pair)
    # To one of them.
    pair[1].send_signal(signal.SIGTERM)
    results = finish(pair)
    assert [code for code, _ in results] == [143, 143], results
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal())
    assert 3 < steps[-1] < 9

    pair = start_all(settings, 2, "--resume")
    wait_for_step(tmp_path / "run", 9, pair)
    for process in pair:
        process.kill()
    finish(pair)
    assert not (tmp_path / "run" / "adapter").exists()

    results = finish(start_all(settings, 1, "--resume"))
    assert [code for code, _ in results] == [0], results
    assert_same_run(tmp_path / "run", alone)


def test_half_of_the_flags_are_refused() -> None:
    command = [
        sys.executable,
        "-m",
        "idlm_jax.cli.main",
        "train",
        "configs/train/smollm2_full.yaml",
        "--process-id",
        "1",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.endswith("belong together; give all three\n") and result.stderr.count("\n") == 1
