"""Range attention through cuDNN's fused attention: the fast path on NVIDIA GPUs until a kernel of our own.

cuDNN knows no intervals, so it gets them as a boolean mask, and the keys of mask groups as more keys: no scores are
stored, but all of ``rows × (keys + rows)`` is computed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.range_attention.reference import GroupKV

# Rows and keys must be even in number; whole 16-byte rows of the mask are faster.
_MULTIPLE = 8


def range_attention(
    q_BRHd: Float[Array, "B R H d"],
    k_BLKd: Float[Array, "B L K d"],
    v_BLKd: Float[Array, "B L K d"],
    start_BR: Int[Array, "B R"],
    end_BR: Int[Array, "B R"],
    group: GroupKV | None = None,
    group_size: int = 1,
) -> Float[Array, "B R H d"]:
    """As ``reference.range_attention``; bfloat16 or float16, head_dim a multiple of 8 up to 128."""
    key = jnp.arange(k_BLKd.shape[1])
    visible = (key >= start_BR[:, :, None]) & (key < end_BR[:, :, None])
    if group is not None:
        row = jnp.arange(q_BRHd.shape[1])
        own = (row[:, None] // group_size == row // group_size) & (row[:, None] >= row)
        visible = jnp.concatenate([visible, jnp.broadcast_to(own, (len(q_BRHd), *own.shape))], axis=2)
        k_BLKd, v_BLKd = (jnp.concatenate(pair, axis=1) for pair in zip((k_BLKd, v_BLKd), group, strict=True))
    rows, padding = q_BRHd.shape[1], ((0, 0), (0, -q_BRHd.shape[1] % _MULTIPLE), (0, -k_BLKd.shape[1] % _MULTIPLE))
    q, k, v = (
        jnp.pad(array, (padding[0], pad, (0, 0), (0, 0)))
        for array, pad in ((q_BRHd, padding[1]), (k_BLKd, padding[2]), (v_BLKd, padding[2]))
    )
    mask = jnp.pad(visible, padding)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")[:, :rows]
