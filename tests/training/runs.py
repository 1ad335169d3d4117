"""Tiny training runs for the tests of the loop and of `idlm train`: data, configurations, what a run wrote."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from idlm_jax.checkpoint.open import open_source
from idlm_jax.cli import main as cli
from idlm_jax.data.tokens import TokenStoreWriter, tokenizer_hash
from idlm_jax.training.metrics import read_metrics
from tests.support import GOLDEN

MODEL = GOLDEN / "gguf" / "qwen3_f32.gguf"
ROOT = Path(__file__).parents[2]
# Numbers of a step that differ between two equal runs.
TIMES = {"time", "step_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}
STEPS = 40
# Three stages, and a checkpoint every 5 steps, so that kills hit all of it.
SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "mode": "gated-lora",
    "mask_token": "90",
    "dtype": "float32",
    "remat": "none",
    "adapter": {"rank": 4},
    "stages": [
        {"steps": 5, "block_size": 1, "noisy_loss": "kl"},
        {"steps": 10, "block_size": 2, "noisy_loss": "kl"},
        {"steps": STEPS - 15, "block_size": 3, "noisy_loss": "tv"},
    ],
    "optimizer": {"learning_rate": 1e-2},
    "schedule_by_stage": True,
    "length": 64,
    "batch_size": 4,
    "evaluation": {"documents": 20, "every": 20},
    "checkpoint": {"every": 5},
}


def make_store(
    path: Path, documents: int = 80, longest: int = 30, prompt: int | None = 3, tokenizer: str | None = None
) -> Path:
    """Documents of counted tokens, learnt after ``prompt`` tokens, or nowhere; ``tokenizer`` is the hash of another."""
    source, rng = open_source(MODEL), np.random.default_rng(0)
    vocabulary = source.config.vocab_size
    tokenizer = tokenizer or tokenizer_hash(source.tokenizer())
    with TokenStoreWriter(path, vocab_size=vocabulary, tokenizer_hash=tokenizer, settings={}) as writer:
        for number in range(documents):
            index = np.arange(longest if number == 0 else rng.integers(8, longest))
            tokens = (index * rng.integers(1, 5) + number) % (vocabulary - 10)
            writer.append(tokens, np.zeros(len(index), bool) if prompt is None else index >= prompt)
        writer.finish({})
    return path


def write_settings(path: Path, store: Path, output: Path, **changes: Any) -> Path:
    """A configuration file: SETTINGS, but for some."""
    settings = {**SETTINGS, "data": str(store), "output": str(output), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


def idlm_train(*arguments: object) -> int:
    """`idlm train` inside this process; the exit code."""
    return cli.main(["train", *map(str, arguments)])


@contextmanager
def shared_compilations(paths: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Programs compiled here are kept for other runs of the session, also those in a process with the environment that
    this yields.
    """
    base = paths.getbasetemp()
    settings = {
        # Beside the folders of pytest-xdist's workers, if there are any.
        "jax_compilation_cache_dir": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # Halves the time of compiling, which is nearly all that these runs take.
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield {**os.environ, **{name.upper(): str(value) for name, value in settings.items()}}
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def numbers(output: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl without what depends on the clock."""
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in read_metrics(output)]


def checkpoints(output: Path) -> list[int]:
    """Steps of the checkpoints that a run left."""
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdecimal())


def start(environment: dict[str, str], *arguments: object, program: str = "") -> subprocess.Popen[str]:
    """`idlm train` as a process of its own, after the lines of ``program``."""
    code = f"import sys\nfrom idlm_jax.cli.main import main\n{program}\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", *map(str, arguments)]
    # Whoever runs the tests in the background ignores SIGINT, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
