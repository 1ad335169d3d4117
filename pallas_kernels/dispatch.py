"""What the operations with kernels by Pallas share: which kernels are the device's, who chooses them, meshes.

``<operation>/gpu.py`` is for Hopper GPUs, ``<operation>/tpu.py`` for TPUs; both define the same functions.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

import pallas_kernels

_MODULES = {"gpu 9.0": "gpu", "tpu": "tpu"}
_log = logging.getLogger(__name__)


@cache
def device() -> str:
    """The platform computations run on by default, with the compute capability of a GPU: "cpu", "tpu", "gpu 9.0"."""
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
    unsupported: Callable[[ModuleType], str | None],
    otherwise: str = "xla",
) -> str:
    """The implementation to run: the one asked for, or for ``auto`` Pallas where it can run, and ``otherwise``.

    ``unsupported`` says why kernels cannot take the inputs. What ``auto`` chooses is logged once. Raises ValueError for
    an unknown implementation, and for ``pallas`` where it cannot run.
    """
    if asked not in implementations:
        raise ValueError(f"unknown implementation '{asked}' (one of {', '.join(implementations)})")
    if asked not in ("auto", "pallas"):
        return asked
    reason = f"needs a Hopper GPU (compute capability 9.0) or a TPU, not {device()}"
    if device() in _MODULES:
        reason = unsupported(kernels(operation))
    name = operation.replace("_", " ")
    if asked == "pallas":
        if reason:
            raise ValueError(f"{name}: 'pallas' does not run here: {reason}")
        return asked
    reason = reason or (None if pallas_kernels.BY_DEFAULT else "runs when asked for")
    chosen = otherwise if reason else "pallas"
    _announce(f"{name}: {chosen} on {device()}" + (f" (pallas: {reason})" if reason else ""))
    return chosen


def on_each_device(function: Callable[..., Array], q: Array, *others: object) -> Array:
    """``function(q, *others)``; on a mesh, each device's part of it, which lies as that of ``q`` does."""
    if jax.typeof(q).sharding.mesh.empty:
        return function(q, *others)
    spec: PartitionSpec = jax.typeof(q).sharding.spec
    return jax.shard_map(function, out_specs=spec, check_vma=False)(q, *others)


@cache
def _announce(choice: str) -> None:
    _log.info(choice)
