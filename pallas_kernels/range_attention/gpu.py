"""Range attention on Hopper GPUs by kernels of our own, forward and backward (``gpu_kernels``)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.range_attention import gpu_kernels
from pallas_kernels.range_attention.gpu_tiles import HALO, MULTIPLE, Source, make_source
from pallas_kernels.range_attention.reference import RANGE_ATTENTION, GroupKV

_DTYPES, _HEAD_DIMS = (jnp.bfloat16, jnp.float16), (64, 128)
# Of larger groups the first rows would lie outside of the own keys that a block loads.
_LARGEST_GROUP = HALO + 1


def refusal(dtype: Any, head_dim: int, group_size: int) -> str | None:
    """Why the kernels cannot take such inputs, or None."""
    if dtype not in _DTYPES:
        return f"bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim not in _HEAD_DIMS:
        return f"head_dim 64 or 128, not {head_dim}"
    if group_size > _LARGEST_GROUP:
        return f"groups of up to {_LARGEST_GROUP} rows, not {group_size}"
    return None


def range_attention(
    q_BRHd: Float[Array, "B R H d"],
    k_BLKd: Float[Array, "B L K d"],
    v_BLKd: Float[Array, "B L K d"],
    start_BR: Int[Array, "B R"],
    end_BR: Int[Array, "B R"],
    group: GroupKV | None = None,
    group_size: int = 1,
    *,
    interpret: bool = False,
) -> Float[Array, "B R H d"]:
    """As ``reference.range_attention``, but rows that see no key give 0; gradients of q, k, v and group.

    ``interpret`` runs the kernels on the CPU. Raises ValueError for inputs that ``refusal`` names.
    """
    if reason := refusal(q_BRHd.dtype, q_BRHd.shape[-1], group_size):
        raise ValueError(f"range attention by the GPU kernels: {reason}")
    rows, length = q_BRHd.shape[1], k_BLKd.shape[1]
    keys, intervals = ((k_BLKd, v_BLKd),), ((jnp.clip(start_BR, 0, length), jnp.clip(end_BR, 0, length)),)
    if group is not None:
        # The rows' own keys are one more array of keys, of which a row sees those of its group up to itself.
        row = jnp.broadcast_to(jnp.arange(rows), start_BR.shape)
        keys, intervals = (*keys, group), (*intervals, (row - row % group_size, row + 1))
    q_BRHd, keys, intervals = jax.tree.map(_pad, (q_BRHd, keys, intervals))
    return _attention(interpret, intervals, q_BRHd, keys)[:, :rows]


def _pad(array: Array) -> Array:
    """Whole groups of rows or keys on axis 1; rows so added see nothing."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, -array.shape[1] % MULTIPLE)
    return jnp.pad(array, padding)


def _sources(keys: Any, intervals: Any) -> list[Source]:
    return [make_source(*pair, *interval) for pair, interval in zip(keys, intervals, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret: bool, intervals: Any, q_BRHd: Array, keys: Any) -> Array:
    """Over any number of (keys, values) pairs with a (start, end) pair each, in one softmax."""
    return _attention_forward(interpret, intervals, q_BRHd, keys)[0]


def _attention_forward(interpret: bool, intervals: Any, q_BRHd: Array, keys: Any) -> tuple[Array, Any]:
    results = gpu_kernels.forward(q_BRHd, _sources(keys, intervals), interpret)
    # A policy may name what need not be computed again for the gradient.
    out, lse = (checkpoint_name(array, RANGE_ATTENTION) for array in results)
    return out, (intervals, q_BRHd, keys, out, lse)


def _attention_backward(interpret: bool, saved: Any, d_out_BRHd: Array) -> tuple[Any, Array, Any]:
    intervals, q_BRHd, keys, out, lse = saved
    delta_BRH = jnp.sum(out.astype(jnp.float32) * d_out_BRHd.astype(jnp.float32), axis=3)
    delta = jnp.pad(delta_BRH.swapaxes(1, 2), ((0, 0), (0, 0), (0, lse.shape[2] - out.shape[1])))
    sources = _sources(keys, intervals)
    d_q = gpu_kernels.query_gradient(q_BRHd, sources, d_out_BRHd, lse, delta, interpret)
    # A call for each source: the compiler drops that of keys which need no gradient (a frozen clean stream).
    d_keys = tuple(gpu_kernels.key_gradients(q_BRHd, source, d_out_BRHd, lse, delta, interpret) for source in sources)
    return None, d_q, d_keys


_attention.defvjp(_attention_forward, _attention_backward)
