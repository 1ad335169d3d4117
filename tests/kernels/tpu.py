"""What the tests of TPU kernels share: running them on a CPU, and compiling them for chips that are not there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

CHIPS = ("v5e", "v6e")
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")


def interpreted(function: Callable, *arguments: object) -> object:
    """``function`` jitted, with its TPU kernels interpreted: memory starts as NaN and races are printed."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        return jax.block_until_ready(jax.jit(function)(*arguments))


def chips(name: str, size: str = "1x1") -> list[jax.Device]:
    """Devices to compile for: ``size`` chips of that kind, one host."""
    # Test processes run side by side, and libtpu's look for a machine's other hosts would only take time.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost", TPU_SKIP_MDS_QUERY="1")
    bounds = (*(int(side) for side in size.split("x")), 1)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{name}:{size}", chips_per_host_bounds=bounds
    )
    return topology.devices


@contextmanager
def chip(name: str) -> Iterator[SingleDeviceSharding]:
    """Arguments with the sharding that this yields are compiled for one chip of that kind.

    Inside, Pallas knows the kind of the chip, which some kernels need; programs see a mesh.
    """
    device = AbstractDevice(device_kind=f"TPU {name}", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield SingleDeviceSharding(chips(name)[0])
