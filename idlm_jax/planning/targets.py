"""Devices to compile for that need not be there: chips by name, their ceilings, and their topologies."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import topologies

from idlm_jax.errors import UserError, did_you_mean
from pallas_kernels import dispatch

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What bounds a step on one chip."""

    # As `pallas_kernels.dispatch` names its kind: "gpu 9.0", "tpu".
    platform: str
    # Bytes that a program may have.
    memory: int
    # Dense bf16 FLOP/s, bytes/s of its memory, and bytes/s that it can send over all its links.
    peak: float
    bandwidth: float
    links: float
    # Number of chips -> the topology of so many, as the compiler calls it.
    topologies: dict[int, str]


_GPUS = {count: f"1x1x{count}" for count in (1, 2, 4, 8)}
_SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CHIPS = {
    # NVIDIA's data sheets of the H100 and H200 (SXM): half of the sparse peak; NVLink's 900 GB/s count both directions.
    # Memory of the H100 as XLA describes it (h100_sxm.txtpb).
    "h100": Chip("gpu 9.0", 84_929_347_584, 989.4e12, 3.35e12, 450e9, _GPUS),
    "h200": Chip("gpu 9.0", 141 * 10**9, 989.4e12, 4.8e12, 450e9, _GPUS),
    # Google's pages of Cloud TPUs (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e). Links are said to have 400 GB/s (v5e)
    # and 800 GB/s (v6e) in both directions, 4800 Gbit/s (v5p) in one. Memory is what their compiler gives to programs.
    "v5e": Chip("tpu", int(15.75 * _GIB), 197e12, 819e9, 200e9, _SQUARES),
    "v5p": Chip("tpu", int(95.74 * _GIB), 459e12, 2765e9, 600e9, _CUBES),
    "v6e": Chip("tpu", int(31.25 * _GIB), 918e12, 1638e9, 400e9, _SQUARES),
}
_EXAMPLES = "h100x8, h200x4, v5e-16, v5p-64, v6e-8"


@dataclass(frozen=True)
class Target:
    """So many chips of a kind."""

    name: str
    chip: Chip
    count: int

    @property
    def is_gpu(self) -> bool:
        """Whether it is for the CUDA plug-in to compile for, rather than for libtpu."""
        return self.chip.platform.startswith("gpu")

    def devices(self) -> list[jax.Device]:
        """Devices that programs can be compiled for; raises UserError where the compiler for them is not installed."""
        plugin, extra = ("jax_cuda13_plugin", "gpu") if self.is_gpu else ("libtpu", "tpu")
        if find_spec(plugin) is None:
            raise UserError(f"{self.name}: compiling for it needs {plugin}: pip install 'idlm-jax[{extra}]'")
        topology = self.chip.topologies[self.count]
        if self.is_gpu:
            # The chip is described, not found.
            os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
            return topologies.get_topology_desc(
                platform="cuda", target_config=_description(self.name.partition("x")[0], self.chip), topology=topology
            ).devices
        # Processes run side by side, and libtpu's look for a machine's other hosts would only take time.
        os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost", TPU_SKIP_MDS_QUERY="1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # any: else it says that it does not know
        name = f"{self.name.partition('-')[0]}:{topology}"
        one_host = {"chips_per_host_bounds": (1, 1, 1)} if self.count == 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **one_host).devices


def parse_target(name: str) -> Target:
    """The target of a name such as ``h100x8`` or ``v5e-16``, N chips; raises UserError."""
    match = re.fullmatch(r"([a-z]+\d+[a-z]?)(x|-)(\d+)", name.lower())
    kind = match[1] if match else re.split(r"[x-]", name.lower())[0]
    if kind not in CHIPS:
        raise UserError(f"unknown target '{name}' (such as {_EXAMPLES}){did_you_mean(kind, CHIPS)}")
    chip = CHIPS[kind]
    separator = "x" if chip.platform.startswith("gpu") else "-"
    if match is None or match[2] != separator:
        raise UserError(f"unknown target '{name}'; did you mean '{kind}{separator}{max(chip.topologies)}'?")
    if int(match[3]) not in chip.topologies:
        sizes = ", ".join(map(str, chip.topologies))
        where = "GPUs of one host" if separator == "x" else "chips of a slice"
        raise UserError(f"{name}: {where} can be {sizes}")
    return Target(name.lower(), chip, int(match[3]))


@contextmanager
def compiling_for(target: Target) -> Iterator[list[jax.Device]]:
    """Inside, kernels are chosen as they would be on the target, whose devices this yields."""
    devices = target.devices()
    # What was traced for one target says which kernels run there.
    jax.clear_caches()
    with dispatch.assumed(target.chip.platform), _hopper_for_triton() if target.is_gpu else nullcontext():
        yield devices


@contextmanager
def _hopper_for_triton() -> Iterator[None]:
    """Inside, jax-triton takes the GPU of this machine, which need not be there, for one of Hopper's."""
    if dispatch.triton_obstacle() is not None:
        yield
        return
    from jax_triton import triton_lib

    library = triton_lib.triton_kernel_call_lib
    asked = library.get_compute_capability
    library.get_compute_capability = lambda _: 90
    try:
        yield
    finally:
        library.get_compute_capability = asked


def _description(kind: str, chip: Chip) -> str:
    """A GPU in the words of XLA: the H100's, with the memory of the kind asked for."""
    text = (Path(__file__).parent / "h100.txtpb").read_text(encoding="utf-8")
    if kind == "h100":
        return text
    text = re.sub(r"memory_bandwidth: \d+", f"memory_bandwidth: {chip.bandwidth:.0f}", text)
    return re.sub(r"device_memory_size: \d+", f"device_memory_size: {chip.memory}", text)
