"""The two-stream forward pass: clean tokens through the causal model, then mask groups that see them (design.md 6).

No array of both streams and no mask of their product is ever built: in every layer the clean pass hands its keys and
values to the noisy pass, and they need not be kept any longer.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from idlm_jax.backbone.qwen3 import Qwen3, Stream
from idlm_jax.training.groups import Batch, NoisyRows
from pallas_kernels.range_attention.api import range_attention


def clean_stream(batch: Batch, adapter_from: int | None, implementation: str = "auto") -> Stream:
    """The packed tokens, causal inside each document; its state is the layer's keys and values.

    ``adapter_from`` is None for the base model alone (gated), 0 to adapt every row.
    """
    index = batch.index
    # A row of padding sees itself alone: every row must see a key.
    first = index - batch.positions
    start = jnp.where(batch.segment_ids > 0, first, index)

    def attend(q: Array, k: Array, v: Array, state: Any) -> tuple[Array, tuple[Array, Array]]:
        return range_attention(q, k, v, start, index + 1, implementation=implementation), (k, v)

    return Stream(batch.tokens, batch.positions, attend, adapter_from)


def noisy_stream(rows: NoisyRows, block_size: int, adapter_from: int | None, implementation: str = "auto") -> Stream:
    """The rows of all mask groups, which see the keys and values of the clean stream."""

    def attend(q: Array, k: Array, v: Array, state: tuple[Array, Array]) -> tuple[Array, None]:
        out = range_attention(
            q, *state, rows.key_start, rows.key_end, (k, v), block_size, implementation=implementation
        )
        return out, None

    return Stream(rows.tokens, rows.positions, attend, adapter_from)


def two_streams(
    model: Qwen3,
    batch: Batch,
    rows: NoisyRows,
    block_size: int,
    clean_adapter_from: int | None,
    noisy_adapter_from: int | None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B L D"], Float[Array, "B R D"]]:
    """Final hidden states of the clean tokens and of the rows of all mask groups."""
    streams = (
        clean_stream(batch, clean_adapter_from, implementation),
        noisy_stream(rows, block_size, noisy_adapter_from, implementation),
    )
    # A clean stream without the adapter of the noisy one is gated, and has no gradient.
    gated = clean_adapter_from is None and noisy_adapter_from is not None
    (clean, noisy), _ = model.streams(streams, None, keep_states=gated)
    return clean, noisy
