"""Texts decoded on simulated devices are those decoded on one: heads, vocabulary and requests split."""

import os
import subprocess
import sys
from pathlib import Path


def test_texts_on_a_mesh_equal_those_of_one_device():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "tests.decoding.mesh_check"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == 4  # pages and three cases
    assert "rematerialization" not in done.stderr  # XLA's word for a layout that it can only reach by copying all
