"""Which implementation of range attention runs: ``auto`` picks by platform, dtype and shape, and says so once."""

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.range_attention import cudnn, reference
from pallas_kernels.range_attention.reference import GroupKV

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
_HOPPER = "gpu 9"
_log = logging.getLogger(__name__)


def range_attention(
    q_BRHd: Float[Array, "B R H d"],
    k_BLKd: Float[Array, "B L K d"],
    v_BLKd: Float[Array, "B L K d"],
    start_BR: Int[Array, "B R"],
    end_BR: Int[Array, "B R"],
    group: GroupKV | None = None,
    group_size: int = 1,
    *,
    implementation: str = "auto",
) -> Float[Array, "B R H d"]:
    """``reference.range_attention`` by the implementation asked for; on a mesh each device does its batch and heads.

    Raises ValueError for an unknown implementation, or one that cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation '{implementation}' (one of {', '.join(IMPLEMENTATIONS)})")
    if implementation == "auto":
        implementation = _choose(_device(), q_BRHd.dtype, q_BRHd.shape[-1], group_size)
    if implementation == "xla":
        return reference.range_attention(q_BRHd, k_BLKd, v_BLKd, start_BR, end_BR, group, group_size)
    if implementation == "pallas" and _device() != _HOPPER:
        raise ValueError(f"range attention: 'pallas' needs a Hopper GPU (compute capability 9), not {_device()}")
    module = cudnn if implementation == "cudnn" else _gpu()

    def local(q: Array, k: Array, v: Array, start: Array, end: Array, group: GroupKV | None) -> Array:
        return module.range_attention(q, k, v, start, end, group, group_size)

    arguments = (q_BRHd, k_BLKd, v_BLKd, start_BR, end_BR, group)
    if jax.typeof(q_BRHd).sharding.mesh.empty:
        return local(*arguments)
    spec: PartitionSpec = jax.typeof(q_BRHd).sharding.spec
    return jax.shard_map(local, out_specs=spec, check_vma=False)(*arguments)


def _gpu() -> ModuleType:
    """The kernels for Hopper, imported when they are needed: Mosaic GPU takes a second to import."""
    return import_module("pallas_kernels.range_attention.gpu")


@cache
def _device() -> str:
    """The platform computations run on by default, with the compute capability of a GPU."""
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return f"gpu {str(getattr(jax.devices()[0], 'compute_capability', '')).split('.')[0]}"


@cache
def _choose(device: str, dtype: jnp.dtype, head_dim: int, group_size: int) -> str:
    chosen = "xla"
    if pallas_kernels.BY_DEFAULT and device == _HOPPER and _gpu().refusal(dtype, head_dim, group_size) is None:
        chosen = "pallas"
    elif device.startswith("gpu") and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        chosen = "cudnn"
    _log.info("range attention: %s (%s, %s, head_dim %d)", chosen, device, dtype, head_dim)
    return chosen
