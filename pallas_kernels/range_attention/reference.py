"""Range attention in plain jnp: the oracle of the kernels, and the path that runs everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Under this name (jax.ad_checkpoint.checkpoint_name) the kernels' results can be kept for the backward pass.
RANGE_ATTENTION = "range_attention"

GroupKV = tuple[Float[Array, "B R K d"], Float[Array, "B R K d"]]


def range_attention(
    q_BRHd: Float[Array, "B R H d"],
    k_BLKd: Float[Array, "B L K d"],
    v_BLKd: Float[Array, "B L K d"],
    start_BR: Int[Array, "B R"],
    end_BR: Int[Array, "B R"],
    group: GroupKV | None = None,
    group_size: int = 1,
) -> Float[Array, "B R H d"]:
    """Grouped-query attention in which row r sees the keys ``start[r] … end[r] - 1``.

    With ``group``, keys and values of the rows themselves, every ``group_size`` rows in a row also see each other
    causally (a mask group; R must be a multiple of the size). Every row must see at least one key. Scores and softmax
    are float32; the probabilities are rounded to the dtype of ``v`` for the second product, whose sums are float32
    again. The result has the dtype of ``q``.
    """
    batch, rows, heads, head_dim = q_BRHd.shape
    kv_heads = k_BLKd.shape[2]
    q = q_BRHd.reshape(batch, rows, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    product = partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    key = jnp.arange(k_BLKd.shape[1])
    visible_BRL = (key >= start_BR[:, :, None]) & (key < end_BR[:, :, None])
    scores = product("brkgd,blkd->bkgrl", q, k_BLKd)
    scores = jnp.where(visible_BRL[:, None, None], scores, -jnp.inf)
    if group is None:
        probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BLKd.dtype)
        out = product("bkgrl,blkd->brkgd", probabilities, v_BLKd)
        return out.astype(q_BRHd.dtype).reshape(q_BRHd.shape)

    # n groups of s rows; the softmax runs over both kinds of keys.
    groups = (batch, rows // group_size, group_size)
    k_group, v_group = (array.reshape(*groups, *array.shape[2:]) for array in group)
    own = product("bnskgd,bntkd->bkgnst", q.reshape(*groups, *q.shape[2:]), k_group)
    own = jnp.where(jnp.tril(jnp.ones((group_size, group_size), bool)), own, -jnp.inf)
    own_BKGRs = own.reshape(*own.shape[:3], rows, group_size)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, -1), jnp.max(own_BKGRs, -1)))[..., None]
    weights, own_weights = jnp.exp(scores - largest), jnp.exp(own_BKGRs - largest)
    total = jnp.sum(weights, -1, keepdims=True) + jnp.sum(own_weights, -1, keepdims=True)
    weights, own_weights = (weights / total).astype(v_BLKd.dtype), (own_weights / total).astype(v_BLKd.dtype)
    out = product("bkgrl,blkd->brkgd", weights, v_BLKd)
    out_own = product("bkgnst,bntkd->bnskgd", own_weights.reshape(own.shape), v_group)
    return (out + out_own.reshape(out.shape)).astype(q_BRHd.dtype).reshape(q_BRHd.shape)
