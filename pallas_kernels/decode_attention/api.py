"""Which implementation of window attention runs: ``auto`` picks by platform, dtype and shape, and says so once."""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.decode_attention import reference

IMPLEMENTATIONS = ("auto", "xla", "pallas")
_log = logging.getLogger(__name__)


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
    return _on_each_device(_gpu().window_attention, q_BWHd, k_BKSd, v_BKSd, prefix_B, mask_BWW)


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
    return _on_each_device(_gpu().paged_window_attention, q_BWHd, k_PKSd, v_PKSd, pages_BN, prefix_B, mask_BWW)


def _on_each_device(attend: Callable[..., Array], q_BWHd: Array, *rest: Array) -> Array:
    if jax.typeof(q_BWHd).sharding.mesh.empty:
        return attend(q_BWHd, *rest)
    spec: PartitionSpec = jax.typeof(q_BWHd).sharding.spec
    return jax.shard_map(attend, out_specs=spec, check_vma=False)(q_BWHd, *rest)


def _choose(implementation: str, q: Array, k: Array, paged: bool) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation '{implementation}' (one of {', '.join(IMPLEMENTATIONS)})")
    if implementation == "xla":
        return "xla"
    reason = f"{jax.default_backend()}: needs an NVIDIA GPU of compute capability 9.0"
    if _on_hopper():
        reason = _gpu().unsupported(q, k, paged)
    if implementation == "auto":
        reason = reason or (None if pallas_kernels.BY_DEFAULT else "the kernel runs when asked for")
        _announce("xla" if reason else "pallas", reason)
    elif reason:
        raise ValueError(f"the pallas kernel of window attention does not run here: {reason}")
    return "xla" if reason else "pallas"


def _gpu() -> ModuleType:
    """The kernel for Hopper, imported when it is needed: Mosaic GPU takes a second to import."""
    return import_module("pallas_kernels.decode_attention.gpu")


@cache
def _on_hopper() -> bool:
    return jax.default_backend() == "gpu" and str(jax.local_devices()[0].compute_capability) == "9.0"


@cache
def _announce(chosen: str, reason: str | None) -> None:
    _log.info("window attention: %s%s", chosen, f" ({reason})" if reason else "")
