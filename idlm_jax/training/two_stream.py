"""The two-stream forward pass: clean tokens through the causal model, then mask groups that see them (design.md 6).

No array of both streams and no mask of their product is ever built: the clean pass hands its keys and values, layer by
layer, to the noisy pass.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.training.groups import Batch, NoisyRows
from pallas_kernels.range_attention.api import range_attention

# Keys and values of every layer, stacked.
CleanStates = tuple[Float[Array, "layers B L K d"], Float[Array, "layers B L K d"]]


def clean_stream(
    model: Qwen3, batch: Batch, adapter_from: int | None, implementation: str = "auto"
) -> tuple[Float[Array, "B L D"], CleanStates]:
    """Final hidden states of the packed tokens, causal inside each document, and every layer's keys and values.

    ``adapter_from`` is None for the base model alone (gated), 0 to adapt every row.
    """
    index = batch.index
    # A row of padding sees itself alone: every row must see a key.
    first = index - batch.positions
    start = jnp.where(batch.segment_ids > 0, first, index)

    def attend(q: Array, k: Array, v: Array, state: Any) -> tuple[Array, tuple[Array, Array]]:
        return range_attention(q, k, v, start, index + 1, implementation=implementation), (k, v)

    return model(batch.tokens, batch.positions, attend, None, adapter_from)


def noisy_stream(
    model: Qwen3,
    rows: NoisyRows,
    states: CleanStates,
    block_size: int,
    adapter_from: int | None,
    implementation: str = "auto",
) -> Float[Array, "B R D"]:
    """Final hidden states of the rows of all mask groups, given the keys and values of the clean stream."""

    def attend(q: Array, k: Array, v: Array, state: tuple[Array, Array]) -> tuple[Array, None]:
        out = range_attention(
            q, *state, rows.key_start, rows.key_end, (k, v), block_size, implementation=implementation
        )
        return out, None

    return model(rows.tokens, rows.positions, attend, states, adapter_from)[0]
