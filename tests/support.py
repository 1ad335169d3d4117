"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the scale (standard deviation) of the reference."""
    return float(np.abs(ours - reference).max() / reference.std())


def run_check(module: str, *arguments: object) -> str:
    """Run a module of the tests in a process of its own, which simulates devices; returns what it prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rematerialization" not in done.stderr  # XLA's word for a layout that it can only reach by copying all
    return done.stdout
