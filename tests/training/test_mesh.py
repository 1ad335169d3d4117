"""8 simulated devices train like one: losses, updated weights, and where the optimizer's moments lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("mode", ["full", "gated-lora", "lora", "ar", "wrapped"])
def test_steps_on_a_mesh_equal_steps_on_one_device(mode):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.training.mesh_check", mode]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    assert "rematerialization" not in done.stderr  # XLA's word for a layout that it can only reach by copying all
