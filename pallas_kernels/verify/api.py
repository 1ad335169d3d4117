"""Which implementation of verification runs: ``auto`` picks by platform and coupling, and says so once."""

import importlib.util
import logging
from functools import cache

import jax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.verify import reference
from pallas_kernels.verify.reference import COUPLINGS, Coupling, Drafts, Filters

IMPLEMENTATIONS = ("auto", "xla", "triton")
_log = logging.getLogger(__name__)


def verify(
    logits_BWV: Float[Array, "B W V"],
    filters: Filters,
    coupling: Coupling,
    drafts: Drafts,
    warm_B: Bool[Array, " B"],
    position_BN: Int[Array, "B N"],
    removed: int | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Verify the drafts against the clean rows: number accepted (0 where not warm), and the token that follows them.

    The first N rows of a window (float32 logits) are clean, ``position_BN`` the output positions of their tokens.
    ``removed`` is a token that can never be drawn, the mask.

    Raises ValueError for an unknown implementation, or one asked for that cannot run.
    """
    if _implementation(implementation, logits_BWV, filters, coupling) == "xla":
        return reference.verify(logits_BWV, filters, coupling, drafts, warm_B, position_BN, removed)
    from pallas_kernels.verify import gpu  # needs the optional packages

    return gpu.verify(logits_BWV, filters, coupling, drafts, warm_B, position_BN, removed)


def draft(
    logits_BWV: Float[Array, "B W V"],
    row_Bd: Int[Array, "B drafts"],
    filters: Filters,
    coupling: Coupling,
    position_Bd: Int[Array, "B drafts"],
    removed: int | None = None,
    *,
    implementation: str = "auto",
) -> Drafts:
    """Draft from the given mask rows of every window, for the given output positions.

    Raises ValueError for an unknown implementation, or one asked for that cannot run.
    """
    if _implementation(implementation, logits_BWV, filters, coupling) == "xla":
        return reference.draft(logits_BWV, row_Bd, filters, coupling, position_Bd, removed)
    from pallas_kernels.verify import gpu  # needs the optional packages

    return gpu.draft(logits_BWV, row_Bd, filters, coupling, position_Bd, removed)


def _implementation(asked: str, logits_BWV: Array, filters: Filters, coupling: Coupling) -> str:
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation '{asked}' (one of {', '.join(IMPLEMENTATIONS)})")
    if asked == "xla":
        return asked
    facts = (
        jax.default_backend(),
        str(logits_BWV.dtype),
        str(jax.random.key_impl(filters.key)),
        coupling,
        jax.typeof(logits_BWV).sharding.mesh.empty,
    )
    if asked == "auto":
        return _choose(*facts)
    if reason := _obstacle(*facts):
        raise ValueError(f"verification by Triton {reason}")
    return asked


def _obstacle(platform: str, dtype: str, key_impl: str, coupling: Coupling, one_device: bool) -> str:
    """Why the Triton kernels cannot run; empty if they can."""
    if platform != "gpu":
        return f"needs a GPU, not {platform}"
    if importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("triton") is None:
        return "needs the packages jax-triton and triton (the extra 'gpu')"
    if dtype != "float32":
        return f"needs float32 logits, not {dtype}"
    if key_impl != "threefry2x32" or not jax.config.jax_threefry_partitionable:
        return "knows the noise of partitionable threefry2x32 keys alone"
    if coupling not in COUPLINGS.values():
        return f"knows no coupling '{coupling.name}'"
    return "" if one_device else "does not run on a mesh"


@cache
def _choose(platform: str, dtype: str, key_impl: str, coupling: Coupling, one_device: bool) -> str:
    reason = _obstacle(platform, dtype, key_impl, coupling, one_device)
    reason = reason or ("" if pallas_kernels.BY_DEFAULT else "runs when asked for")
    chosen = "xla" if reason else "triton"
    _log.info("verification (%s): %s%s", coupling.name, chosen, f"; Triton {reason}" if reason else "")
    return chosen
