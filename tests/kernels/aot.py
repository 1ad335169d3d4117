"""Compile for an H100 on a machine that has none, and read what ptxas says about each kernel."""

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import core as mosaic_core

# As XLA describes the SXM model with 80 GB.
H100 = (Path(__file__).parents[2] / "idlm_jax/planning/h100.txtpb").read_text(encoding="utf-8")


@dataclass(frozen=True)
class CompiledKernel:
    """What one Mosaic GPU kernel needs."""

    registers: int  # a thread
    spilled_bytes: int
    shared_bytes: int  # a block


def compile_for_h100(function: Callable, *arguments: jax.ShapeDtypeStruct) -> list[CompiledKernel]:
    """The distinct Mosaic GPU kernels of a compiled function, in the order of compilation.

    Skips the test where JAX's CUDA plug-in is not installed.
    """
    if find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the CUDA plug-in of JAX")
    shared, measure = [], mosaic_core._smem_tree_size

    def record(buffers: object) -> int:
        shared.append(measure(buffers))
        return shared[-1]

    environment = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    with mock.patch.dict(os.environ, environment), mock.patch.object(mosaic_core, "_smem_tree_size", record):
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
        device = jax.sharding.SingleDeviceSharding(topology.devices[0])
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device) for a in arguments]
        jax.clear_caches()
        with tempfile.TemporaryFile("w+") as report:
            # The compiler writes to the process's standard output and error, past Python's.
            saved = [(stream, os.dup(stream)) for stream in (1, 2)]
            try:
                for stream, _ in saved:
                    os.dup2(report.fileno(), stream)
                jax.jit(function).lower(*placed).compile()
            finally:
                for stream, copy in saved:
                    os.dup2(copy, stream)
                    os.close(copy)
            report.seek(0)
            text = report.read()
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", text)]
    return [CompiledKernel(*numbers) for numbers in zip(registers, spills, shared, strict=True)]
