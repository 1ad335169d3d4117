"""Which implementation of range attention runs: ``auto`` picks by platform, dtype and shape, and says so once."""

from functools import partial
from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.range_attention import cudnn, reference
from pallas_kernels.range_attention.reference import GroupKV

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")


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
    head_dim, dtypes = q_BRHd.shape[-1], {array.dtype for array in (q_BRHd, k_BLKd, v_BLKd, *(group or ()))}

    def unsupported(kernels: ModuleType) -> str | None:
        if len(dtypes) > 1:
            return f"arrays of one dtype, not {', '.join(sorted(dtype.name for dtype in dtypes))}"
        return kernels.refusal(q_BRHd.dtype, head_dim, group_size)

    cudnn_can = dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float16")} and head_dim % 8 == 0 and head_dim <= 128
    otherwise = "cudnn" if dispatch.device().startswith("gpu") and cudnn_can else "xla"
    obstacle = partial(dispatch.pallas_obstacle, "range_attention", unsupported)
    chosen = dispatch.choose("range_attention", implementation, IMPLEMENTATIONS, obstacle, otherwise=otherwise)
    if chosen == "xla":
        return reference.range_attention(q_BRHd, k_BLKd, v_BLKd, start_BR, end_BR, group, group_size)
    module = cudnn if chosen == "cudnn" else dispatch.kernels("range_attention")
    attend = partial(module.range_attention, group_size=group_size)
    return dispatch.on_each_device(attend, q_BRHd, k_BLKd, v_BLKd, start_BR, end_BR, group, like=q_BRHd)
