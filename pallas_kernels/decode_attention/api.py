"""Which implementation of window attention runs: ``auto`` picks by platform, dtype and shape, and says so once."""

from functools import partial
from types import ModuleType

import jax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.packing import Packing

IMPLEMENTATIONS = ("auto", "xla", "pallas")


def window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_BKSd: Float[Array, "B K S d"],
    v_BKSd: Float[Array, "B K S d"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B W H d"]:
    """``reference.window_attention`` by the implementation asked for; on a mesh each device does its batch and heads.

    Raises ValueError for an unknown implementation, and for ``pallas`` where the kernel cannot run.
    """
    if _choose(implementation, q_BWHd, k_BKSd, paged=False) == "xla":
        return reference.window_attention(q_BWHd, k_BKSd, v_BKSd, prefix_B, mask_BWW)
    attend = dispatch.kernels("decode_attention").window_attention
    return dispatch.on_each_device(attend, q_BWHd, k_BKSd, v_BKSd, prefix_B, mask_BWW, like=q_BWHd)


def paged_window_attention(
    q_BWHd: Float[Array, "B W H d"],
    k_PKSd: Float[Array, "P K page d"],
    v_PKSd: Float[Array, "P K page d"],
    pages_BN: Int[Array, "B N"],
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B W H d"]:
    """``reference.paged_window_attention`` by the implementation asked for, as ``window_attention``.

    On a mesh that splits the batch, a device's page numbers count its own pages.
    """
    if _choose(implementation, q_BWHd, k_PKSd, paged=True) == "xla":
        return reference.paged_window_attention(q_BWHd, k_PKSd, v_PKSd, pages_BN, prefix_B, mask_BWW)
    attend = dispatch.kernels("decode_attention").paged_window_attention
    return dispatch.on_each_device(attend, q_BWHd, k_PKSd, v_PKSd, pages_BN, prefix_B, mask_BWW, like=q_BWHd)


def packing(
    implementation: str, q_BWHd: jax.ShapeDtypeStruct, k_PKSd: Float[Array, "P K S d"], paged: bool
) -> Packing | None:
    """How the kernel that would run wants such queries packed; None where it takes them as they are.

    Whoever makes the queries may then make them packed, for ``packed_window_attention``. For one device.
    """
    if _choose(implementation, q_BWHd, k_PKSd, paged) == "xla" or dispatch.device() == "tpu":
        return None
    return dispatch.kernels("decode_attention").packing(q_BWHd, k_PKSd, paged)


def packed_window_attention(
    q_BKTrd: Float[Array, "B K T stored d"],
    k_PKSd: Float[Array, "P K S d"],
    v_PKSd: Float[Array, "P K S d"],
    pages_BN: Int[Array, "B N"] | None,
    prefix_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    pack: Packing,
) -> Float[Array, "B W H d"]:
    """Attention of packed queries by the kernel that ``packing`` answered for, over pages or without them."""
    kernels = dispatch.kernels("decode_attention")
    return kernels.packed_window_attention(q_BKTrd, k_PKSd, v_PKSd, pages_BN, prefix_B, mask_BWW, pack)


def _choose(implementation: str, q: Array | jax.ShapeDtypeStruct, k: Array, paged: bool) -> str:
    def unsupported(kernels: ModuleType) -> str | None:
        return kernels.unsupported(q, k, paged)

    obstacle = partial(dispatch.pallas_obstacle, "decode_attention", unsupported)
    return dispatch.choose("decode_attention", implementation, IMPLEMENTATIONS, obstacle)
