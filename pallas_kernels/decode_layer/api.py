"""Which implementation runs between the products of decode layers: ``auto`` picks by platform, dtype and shape.

There is no choice gap by gap: the kernels hand products and norms to each other in another form than plain JAX does.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

import pallas_kernels
from pallas_kernels import dispatch

IMPLEMENTATIONS = ("auto", "xla", "triton")
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128, 256)
# Window rows of a request; more are a prefill chunk, whose time goes into its products.
MAX_WINDOW = 64


def choose(
    implementation: str,
    tokens_BW: Int[Array, "B W"],
    dtype: jnp.dtype,
    head_dim: int,
    lacking: Callable[[], str | None],
) -> str:
    """``xla`` or ``triton`` for all layers that a window of tokens runs through, in ``dtype``.

    ``lacking`` says what of the model is not as the kernels need it, None if nothing. Raises ValueError for an unknown
    implementation, and for ``triton`` where the kernels cannot run.
    """

    def obstacle() -> str | None:
        return _obstacle() or lacking() or _unsupported(tokens_BW, dtype, head_dim)

    return dispatch.choose("decode_layer", implementation, IMPLEMENTATIONS, obstacle, kernel="triton")


def by_default(dtype: jnp.dtype) -> bool:
    """Whether ``auto`` takes the kernels on this machine for a model of this dtype that lacks nothing."""
    return pallas_kernels.BY_DEFAULT and _obstacle() is None and dtype in DTYPES


def _obstacle() -> str | None:
    if dispatch.device() != "gpu 9.0":
        return f"needs a Hopper GPU (compute capability 9.0), not {dispatch.device()}"
    return dispatch.triton_obstacle()


def _unsupported(tokens_BW: Array, dtype: jnp.dtype, head_dim: int) -> str | None:
    if dtype not in DTYPES:
        return f"{dtype}: must be bfloat16 or float16"
    if tokens_BW.shape[1] > MAX_WINDOW:
        return f"{tokens_BW.shape[1]} window rows: at most {MAX_WINDOW}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}: must be one of {', '.join(map(str, HEAD_DIMS))}"
    return None
