"""``scripts/bench_serve.py`` with a tiny model: its server and its clients in processes of their own."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from idlm_jax.config import load_yaml

ROOT = Path(__file__).parents[2]
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_idle_time_is_what_no_stream_of_the_device_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    idle_shares = importlib.import_module("device_idle").idle_shares

    def name(kind: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
        return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}

    def ran(pid: int, tid: int, begin: float, end: float) -> dict[str, Any]:
        return {"ph": "X", "name": "kernel", "pid": pid, "tid": tid, "ts": begin, "dur": end - begin}

    host = [name("process", "/host:CPU", 9), name("thread", "Stream", 9, 1), ran(9, 1, 0, 5000)]
    device = [name("process", "/device:GPU:0", 1), name("thread", "Stream #13(Compute)", 1, 2)]
    others = [name("thread", "Stream #14(Copy)", 1, 3), name("thread", "XLA Modules", 1, 4), ran(1, 4, 0, 2000)]
    # Busy: 100 … 500 (two streams, one inside the other), 510 … 700, 800 … 1100: idle 10 and 100 of 1000 µs.
    kernels = [ran(1, 2, 510, 700), ran(1, 2, 100, 500), ran(1, 3, 200, 300), ran(1, 2, 800, 1100)]
    assert idle_shares([*host, *device, *others, *kernels]) == pytest.approx((0.11, 0.1))
    # Those that begin in the first six tenths, from 100 to 700: idle 10 of 600 µs.
    assert idle_shares([*host, *device, *others, *kernels], (0.0, 0.6)) == pytest.approx((10 / 600, 0))
    assert idle_shares([*host, *device, *others, *kernels], (0.65, 0.69)) is None
    assert idle_shares(host) is None


def bench(*more: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "scripts" / "bench_serve.py", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_acceptance_is_simulated_as_asked_and_every_line_says_so(tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(load_yaml(ROOT / "configs" / "models" / "qwen3-8b.yaml") | TINY))
    sizes = ("--prompt-tokens", 8, "--output-tokens", 400, "--concurrency", 1, 4, "--dtype", "float32")
    more = ("--fixed", "--trace", 4, "--output", tmp_path / "out")
    done = bench("--config", config, *sizes, "--simulated-acceptance", 0.8, *more)
    assert done.returncode == 0, done.stderr
    stored: Any = json.loads((tmp_path / "out" / "serve.json").read_text())
    by_way = {(level["way"], level["concurrency"]): level for level in stored["levels"]}
    ways = ("AR", "ISD N≤4", "ISD N=4 standard")
    assert set(by_way) == {(way, clients) for way in ways for clients in (1, 4)}
    for (way, _), level in by_way.items():
        assert level["errors"] == {} and level["output_tokens"] == 8 * 400 and level["simulated_acceptance"] == 0.8
        assert sum(level["rounds"].values()) >= 400 / 4
        if way == "AR":
            assert level["tokens_per_forward"] == 1 and list(level["rounds"]) == ["AR"]
            continue
        if way == "ISD N≤4":
            # Whatever is the fastest here.
            assert set(level["rounds"]) <= {"AR", *(f"N = {n} standard" for n in (2, 3, 4)), "N = 4 branch"}
            continue
        assert list(level["rounds"]) == ["N = 4 standard"]
        # About 1200 verifying rounds: four standard errors.
        assert level["acceptance"] == pytest.approx([0.8, 0.64, 0.512], abs=0.06)
        # method.md 6.2: (2 + P1 + P2) / (2 - P3).
        assert level["tokens_per_forward"] == pytest.approx((2 + 0.8 + 0.64) / (2 - 0.512), rel=0.04)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 6 and all("SIMULATED at 0.8" in line for line in lines)
    said = [line for line in done.stderr.splitlines() if '"way"' in line]
    assert len(said) == 6 and all("SIMULATED at 0.8" in line for line in said)


@pytest.mark.slow
def test_a_real_model_is_never_simulated() -> None:
    done = bench("--model", "models/any", "--simulated-acceptance", 0.9)
    assert done.returncode == 1 and "is for random weights" in done.stderr and not done.stdout
