"""8 simulated devices train like one: losses, gradients, updated weights, and where the optimizer's moments lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MIXED = "2,2,2"


def check(*arguments: str) -> None:
    flags = "--xla_backend_optimization_level=0"  # compilation is what takes time
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.training.mesh_check", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    assert "rematerialization" not in done.stderr  # XLA's word for a layout that it can only reach by copying all


@pytest.mark.parametrize("mode", ["full", "gated-lora"])
def test_every_mesh_of_8_devices_has_the_losses_and_gradients_of_one(mode):
    check(mode)


@pytest.mark.parametrize("mode", ["lora", "ar"])
def test_a_mixed_mesh_has_the_losses_and_gradients_of_one_device(mode):
    check(mode, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "ar"])
def test_every_mesh_of_8_devices_has_the_losses_and_gradients_of_one_in_other_modes(mode):
    check(mode)


def test_kernels_on_their_own_shards_train_like_the_reference_on_the_whole():
    check("wrapped")


def test_an_error_of_the_partitioner_would_be_seen():
    check("partitioner")
