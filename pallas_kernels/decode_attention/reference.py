"""Window attention in plain jnp: the oracle of the kernels, and the path that runs everywhere."""

from functools import partial

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
    must see at least one key. Slots from ``prefix + W`` on get no weight, whatever finite values they hold. Scores and
    softmax are float32; the probabilities are rounded to the dtype of ``v`` for the second product, whose sums are
    float32 again. The result has the dtype of ``q``.
    """
    batch, rows, heads, head_dim = q_BWHd.shape
    kv_heads, slots = k_BKSd.shape[1], k_BKSd.shape[2]
    group = heads // kv_heads
    # The query heads of one key head are rows of one product, so that slots stay the minor axis of the scores and XLA
    # makes one kernel of scale, mask and softmax.
    q = q_BWHd.reshape(batch, rows, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * rows, head_dim)
    tail = jnp.arange(slots)[None, :] - prefix_B[:, None]
    in_window = jnp.take_along_axis(mask_BWW, jnp.clip(tail, 0, rows - 1)[:, None, :], axis=2)
    visible = (tail < 0)[:, None, :] | (in_window & (tail < rows)[:, None, :])
    bias = jnp.where(jnp.tile(visible, (1, group, 1)), 0.0, -jnp.inf)[:, None]

    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores = product(q, k_BKSd, (((3,), (3,)), ((0, 1), (0, 1))))
    probabilities = jax.nn.softmax(scores * head_dim**-0.5 + bias, axis=-1).astype(v_BKSd.dtype)
    out = product(probabilities, v_BKSd, (((3,), (2,)), ((0, 1), (0, 1))))
    out = out.reshape(batch, kv_heads, group, rows, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q_BWHd.shape).astype(q_BWHd.dtype)


def place_in_pages(
    pages_BN: Int[Array, "B N"], slot_BW: Int[Array, "B W"], page: int
) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
    """Which page of ``page`` slots each slot of a request lies in, and where in it."""
    return jnp.take_along_axis(pages_BN, slot_BW // page, axis=1, mode="clip"), slot_BW % page


def paged_window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_PKSd: Float[Array, "P K page d"],
    v_PKSd: Float[Array, "P K page d"],
    pages_BN: Int[Array, "B N"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
) -> Float[Array, "B W H d"]:
    """``window_attention`` over a cache in pages: slot s of request b lies in page ``pages[b, s // page]``.

    Entries after the page of a request's last slot may be anything, also numbers of pages that do not exist; slots from
    ``prefix + W`` on, which others may have filled before, may hold anything.
    """
    end_B = prefix_B + q_BWHd.shape[1]

    def dense(pages_PKSd: Array) -> Float[Array, "B K S d"]:
        gathered = jnp.take(pages_PKSd, pages_BN, axis=0, mode="clip").swapaxes(1, 2)
        gathered = gathered.reshape(*gathered.shape[:2], -1, gathered.shape[-1])
        used_BS = jnp.arange(gathered.shape[2]) < end_B[:, None]
        return jnp.where(used_BS[:, None, :, None], gathered, 0)

    return window_attention(q_BWHd, dense(k_PKSd), dense(v_PKSd), prefix_B, mask_BWW)
