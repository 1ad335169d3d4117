"""Window attention in plain jnp: the oracle of the kernels, and the path that runs everywhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_BKSd: Float[Array, "B K S d"],
    v_BKSd: Float[Array, "B K S d"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
) -> Float[Array, "B W H d"]:
    """Grouped-query attention of W rows whose own keys and values already lie in slots ``prefix … prefix + W - 1``.

    Every row sees all slots before ``prefix_B`` and, inside the window, what ``mask_BWW`` (row, key) allows; each row
    must see at least one key. Slots from ``prefix + W`` on are never read. Scores and softmax are float32; the
    probabilities are rounded to the dtype of ``v`` for the second product, whose sums are float32 again. The result has
    the dtype of ``q``.
    """
    batch, rows, heads, head_dim = q_BWHd.shape
    kv_heads, slots = k_BKSd.shape[1], k_BKSd.shape[2]
    precision = jax.lax.Precision.HIGHEST if q_BWHd.dtype == jnp.float32 else None
    q = q_BWHd.reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bwkgd,bksd->bkgws", q, k_BKSd, precision=precision, preferred_element_type=jnp.float32)
    tail = jnp.arange(slots)[None, :] - prefix_B[:, None]
    in_window = jnp.take_along_axis(mask_BWW, jnp.clip(tail, 0, rows - 1)[:, None, :], axis=2)
    visible = jnp.where(tail[:, None, :] < 0, True, in_window & (tail < rows)[:, None, :])
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BKSd.dtype)
    out = jnp.einsum(
        "bkgws,bksd->bwkgd", probabilities, v_BKSd, precision=precision, preferred_element_type=jnp.float32
    )
    return out.reshape(q_BWHd.shape).astype(q_BWHd.dtype)
