"""Which implementation of verification runs: ``auto`` picks by platform and coupling, and says so once."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.verify import reference
from pallas_kernels.verify.reference import COUPLINGS, Coupling, Drafts, Filters

IMPLEMENTATIONS = ("auto", "xla", "triton")


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
    obstacle = partial(_obstacle, logits_BWV, filters, coupling)
    return dispatch.choose("verify", asked, IMPLEMENTATIONS, obstacle, kernel="triton")


def _obstacle(logits_BWV: Array, filters: Filters, coupling: Coupling) -> str | None:
    """Why the Triton kernels cannot run."""
    if reason := dispatch.triton_obstacle():
        return reason
    if logits_BWV.dtype != jnp.float32:
        return f"needs float32 logits, not {logits_BWV.dtype}"
    if str(jax.random.key_impl(filters.key)) != "threefry2x32" or not jax.config.jax_threefry_partitionable:
        return "knows the noise of partitionable threefry2x32 keys alone"
    if coupling not in COUPLINGS.values():
        return f"knows no coupling '{coupling.name}'"
    return None if dispatch.on_one_device(logits_BWV) else "does not run on a mesh"
