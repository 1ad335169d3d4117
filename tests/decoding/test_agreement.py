"""Cached windows against full replay: every row says what a plain causal pass over the tokens it sees would say.

This ties the decoder to the model's definition of a draft (method.md 11.2): a mask row of a group anchored after clean
row a is row ``a + 1 + j`` of the text ``prefix, clean rows 0 … a, M, M, …``, fed whole and without a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.cache import cached_attention, init_cache
from idlm_jax.decoding.step import prefill_chunk
from idlm_jax.decoding.window import LAYOUTS, Layout, build_window
from pallas_kernels.decode_attention.reference import window_attention
from tests.decoding.helpers import MASK, drafting_adapter, drafting_model

LENGTHS = np.array([0, 5, 9, 24])
BATCH, CHUNK, SLOTS, MASKS_FROM = len(LENGTHS), 24, 64, 28


@jax.jit(static_argnums=(0, 1))
def cached_logits(layout: Layout, stride: int, model: Qwen3, prefix, pending, drafts, warm) -> jax.Array:
    """Prefill, then one window over the cache."""
    cache = prefill_chunk(model, init_cache(model.config, BATCH, SLOTS, jnp.float32), prefix, 0, None)
    length = jnp.asarray(LENGTHS)
    window = build_window(layout, stride, MASK, length, pending, drafts, warm)
    attend = cached_attention(length, window.mask)
    return model.logits(model(window.tokens, window.positions, attend, cache, stride)[0])


@jax.jit
def replay(model: Qwen3, tokens: jax.Array, padding: jax.Array) -> jax.Array:
    """Logits of full causal passes without a cache, the adapter on rows MASKS_FROM and later.

    Texts are padded on the left, so that the masks of all of them begin at row MASKS_FROM: one program.
    """
    row = jnp.arange(tokens.shape[1])
    own = row >= padding[:, None]
    causal = (row[:, None] >= row[None, :])[None] & (own[:, None, :] | (row[:, None] == row[None, :]))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
        nothing = jnp.zeros(len(tokens), jnp.int32)
        return window_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), nothing, causal), state

    positions = jnp.maximum(row - padding[:, None], 0)
    layers = (None,) * model.config.num_hidden_layers
    return model.logits(model(tokens, positions, attend, layers, MASKS_FROM)[0])


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_window_rows_equal_a_full_forward_without_cache(layout: str, stride: int, adapted: bool) -> None:
    rng = np.random.default_rng(stride)
    model = drafting_model(drafting_adapter(b_scale=0.5) if adapted else None)
    prefix, pending = rng.integers(0, MASK, (BATCH, CHUNK)), rng.integers(0, MASK, BATCH)
    drafts, warm = rng.integers(0, MASK, (BATCH, stride - 1)), np.array([True, False, True, True])
    ours = np.asarray(cached_logits(LAYOUTS[layout], stride, model, prefix, pending, drafts, warm))
    depth = stride - 1
    wanted = np.full((16, MASKS_FROM + 3), MASK)
    where = []  # (request, group, anchor) of every row of ``wanted``
    for b, length in enumerate(LENGTHS):
        clean = [*prefix[b, :length], pending[b], *drafts[b]]
        for group, anchor in enumerate(range(stride) if layout == "branch" else [depth if warm[b] else 0]):
            wanted[len(where), :MASKS_FROM] = [*[0] * MASKS_FROM, *clean[: length + anchor + 1]][-MASKS_FROM:]
            where.append((b, group, anchor))
    padding = np.array([MASKS_FROM - LENGTHS[b] - anchor - 1 for b, _, anchor in where])
    expected = np.asarray(replay(model, wanted, np.resize(padding, 16)))
    for text, (b, group, anchor) in zip(expected, where, strict=False):
        first = stride + group * depth
        np.testing.assert_allclose(ours[b, first : first + depth], text[MASKS_FROM : MASKS_FROM + depth], atol=1e-4)
        # Clean rows are those of the base model over the same text.
        np.testing.assert_allclose(ours[b, : anchor + 1], text[MASKS_FROM - anchor - 1 : MASKS_FROM], atol=1e-4)
