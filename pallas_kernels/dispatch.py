"""What the operations with kernels share: which kernels are the device's, who chooses them, meshes.

Of kernels by Pallas, ``<operation>/gpu.py`` is for Hopper GPUs and ``<operation>/tpu.py`` for TPUs, and both define the
same functions. Kernels by Triton are in ``gpu.py``.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

import pallas_kernels

_MODULES = {"gpu 9.0": "gpu", "tpu": "tpu"}
_log = logging.getLogger(__name__)


_assumed: ContextVar[str | None] = ContextVar("assumed", default=None)


def device() -> str:
    """The platform computations run on by default, with the compute capability of a GPU: "cpu", "tpu", "gpu 9.0"."""
    return _assumed.get() or _present()


@contextmanager
def assumed(name: str) -> Iterator[None]:
    """Inside, ``device`` has this name: what is traced here is compiled for a device that need not be there."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


@cache
def _present() -> str:
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return f"gpu {getattr(jax.local_devices()[0], 'compute_capability', '')}".rstrip()


def kernels(operation: str) -> ModuleType:
    """The kernels for this device, imported when they are needed: Mosaic GPU takes a second to import."""
    return import_module(f"pallas_kernels.{operation}.{_MODULES[device()]}")


def choose(
    operation: str,
    asked: str,
    implementations: Sequence[str],
    obstacle: Callable[[], str | None],
    kernel: str = "pallas",
    otherwise: str = "xla",
) -> str:
    """The implementation to run: the one asked for, or for ``auto`` the kernel where it can run, and ``otherwise``.

    ``obstacle`` says why the kernel cannot run here, with these inputs. What ``auto`` chooses is logged once. Raises
    ValueError for an unknown implementation, and for a kernel asked for that cannot run.
    """
    if asked not in implementations:
        raise ValueError(f"unknown implementation '{asked}' (one of {', '.join(implementations)})")
    if asked not in ("auto", kernel):
        return asked
    name, reason = operation.replace("_", " "), obstacle()
    if asked == kernel:
        if reason:
            raise ValueError(f"{name}: '{kernel}' does not run here: {reason}")
        return asked
    reason = reason or (None if pallas_kernels.BY_DEFAULT else "runs when asked for")
    chosen = otherwise if reason else kernel
    _announce(f"{name}: {chosen} on {device()}" + (f" ({kernel}: {reason})" if reason else ""))
    return chosen


def pallas_obstacle(operation: str, unsupported: Callable[[ModuleType], str | None]) -> str | None:
    """Why an operation's kernels by Pallas cannot run; ``unsupported`` says why those of a device refuse the inputs."""
    if device() not in _MODULES:
        return f"needs a Hopper GPU (compute capability 9.0) or a TPU, not {device()}"
    return unsupported(kernels(operation))


def triton_obstacle() -> str | None:
    """Why no kernel by Triton can run."""
    if not device().startswith("gpu"):
        return f"needs a GPU, not {device()}"
    if any(importlib.util.find_spec(package) is None for package in ("jax_triton", "triton")):
        return "needs the packages jax-triton and triton (the extra 'gpu')"
    # Since 0.4 an output that takes over an input's memory is no parameter of the kernel any more.
    if not (release := version("jax-triton")).startswith("0.3."):
        return f"needs jax-triton 0.3 (the extra 'gpu'), not {release}"
    return None


def on_one_device(array: Array) -> bool:
    """Whether an array is whole where this runs: there is no mesh, or this is each device's part of a program."""
    mesh = jax.typeof(array).sharding.mesh
    return mesh.empty or mesh.are_all_axes_manual


def on_each_device(function: Callable[..., Any], *arguments: Any, like: Any) -> Any:
    """``function(*arguments)``; on a mesh, each device's part of it, the results lying as the arrays of ``like`` do."""
    if on_one_device(jax.tree.leaves(like)[0]):
        return function(*arguments)
    specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, like)
    return jax.shard_map(function, out_specs=specs, check_vma=False)(*arguments)


def by_request(function: Callable[..., Any], logits: Array, *others: Any) -> Any:
    """``function`` of logits [B, W, V] and what else there is of requests; on a mesh, each device does some of them.

    Each needs its requests' whole rows of the vocabulary: an exchange of what lies split over it is far less than
    gathering all of it everywhere. The results are everywhere.
    """
    if on_one_device(logits):
        return function(logits, *others)
    mesh, split = jax.typeof(logits).sharding.mesh, jax.typeof(logits).sharding.spec
    spec = PartitionSpec(tuple(mesh.axis_names) if logits.shape[0] % mesh.size == 0 else split[0])
    result = jax.shard_map(function, out_specs=spec, check_vma=False)(*jax.reshard((logits, *others), spec))
    return jax.reshard(result, PartitionSpec())


@cache
def _announce(choice: str) -> None:
    _log.info(choice)
