"""Which implementation of range attention runs: ``auto`` picks by platform, dtype and shape, and says so once."""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.range_attention import cudnn, reference
from pallas_kernels.range_attention.reference import GroupKV

IMPLEMENTATIONS = ("auto", "xla", "cudnn")
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

    Raises ValueError for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation '{implementation}' (one of {', '.join(IMPLEMENTATIONS)})")
    if implementation == "auto":
        implementation = _choose(jax.default_backend(), q_BRHd.dtype, q_BRHd.shape[-1])
    if implementation == "xla":
        return reference.range_attention(q_BRHd, k_BLKd, v_BLKd, start_BR, end_BR, group, group_size)

    def local(q: Array, k: Array, v: Array, start: Array, end: Array, group: GroupKV | None) -> Array:
        return cudnn.range_attention(q, k, v, start, end, group, group_size)

    arguments = (q_BRHd, k_BLKd, v_BLKd, start_BR, end_BR, group)
    if jax.typeof(q_BRHd).sharding.mesh.empty:
        return local(*arguments)
    spec: PartitionSpec = jax.typeof(q_BRHd).sharding.spec
    return jax.shard_map(local, out_specs=spec, check_vma=False)(*arguments)


@cache
def _choose(platform: str, dtype: jnp.dtype, head_dim: int) -> str:
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    chosen = "cudnn" if platform == "gpu" and fits else "xla"
    _log.info("range attention: %s (%s, %s, head_dim %d)", chosen, platform, dtype, head_dim)
    return chosen
