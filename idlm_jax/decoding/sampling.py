"""From logits to tokens, as decoding names it; the operation itself is ``pallas_kernels.verify``."""

from pallas_kernels.verify.reference import (
    COUPLINGS,
    PURPOSE_ACCEPT,
    PURPOSE_DRAFT,
    PURPOSE_TOKEN,
    Coupling,
    Drafts,
    Filters,
    GumbelCoupling,
    RatioCoupling,
    empty_drafts,
    filtered_log_probs,
    gumbel_argmax,
    without_token,
)

__all__ = [
    "COUPLINGS",
    "PURPOSE_ACCEPT",
    "PURPOSE_DRAFT",
    "PURPOSE_TOKEN",
    "Coupling",
    "Drafts",
    "Filters",
    "GumbelCoupling",
    "RatioCoupling",
    "empty_drafts",
    "filtered_log_probs",
    "gumbel_argmax",
    "without_token",
]
