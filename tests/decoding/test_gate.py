"""The gate of an adapter: it may change every draft, and not one bit of what verifies or is committed."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from idlm_jax.backbone.adapter import Adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.cache import cached_attention
from idlm_jax.decoding.generate import SamplingParams, advance, emissions, start
from idlm_jax.decoding.step import DecodeState, Policy
from idlm_jax.decoding.window import LAYOUTS, build_window
from tests.decoding.helpers import (
    MASK,
    MOST,
    drafting_adapter,
    drafting_config,
    drafting_model,
    make_policy,
    random_prompts,
    texts,
)
from tests.decoding.support import tiny_adapter

BATCH, STRIDE = 16, 4


def adapters() -> dict[str, Adapter | None]:
    """Adapters whose differences the gate must keep to the mask rows."""
    config = drafting_config()
    return {
        "none": None,
        "zero": drafting_adapter(b_scale=0.0),
        "random": drafting_adapter(b_scale=0.5),
        "other": tiny_adapter(config, seed=40, b_scale=2.0),
    }


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Greedy and sampled requests; some prompts hold or end in the mask token, which is a clean row there."""
    prompts = random_prompts(BATCH, seed=8)
    prompts[2][-1] = MASK
    prompts[5][len(prompts[5]) // 2] = MASK
    return prompts, [SamplingParams(1.0 * (i % 2), seed=i, max_tokens=MOST) for i in range(BATCH)]


def run(adapter: Adapter | None, policy: Policy, rounds: int) -> DecodeState:
    model = drafting_model(adapter)
    prompts, sampling = requests()
    return advance(model, start(model, prompts, sampling, policy), rounds, policy)


@jax.jit(static_argnames="policy")
def window_logits(model: Qwen3, state: DecodeState, policy: Policy, mask_token_id: int) -> jax.Array:
    """Logits of all rows of the next round's window."""
    window = build_window(
        policy.layout, policy.stride, mask_token_id, state.length, state.pending, state.drafts.tokens, state.warm
    )
    attend = cached_attention(state.length, window.mask)
    return model.logits(model(window.tokens, window.positions, attend, state.cache, policy.adapter_from)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_leave_text_and_committed_cache_bit_for_bit(layout: str) -> None:
    policy = make_policy(STRIDE, layout)
    states = {name: run(adapter, policy, MOST) for name, adapter in adapters().items()}
    expected_texts = texts(emissions(states["none"], BATCH))
    histories = set()
    for state in states.values():
        so_far = emissions(state, BATCH)
        assert texts(so_far) == expected_texts
        histories.add(tuple(np.concatenate([emission.history for emission in so_far]).tolist()))
        lengths = np.minimum(state.length, states["none"].length)
        for ours, base in zip(jax.tree.leaves(state.cache), jax.tree.leaves(states["none"].cache), strict=True):
            for b, length in enumerate(lengths):
                np.testing.assert_array_equal(ours[b, :, :length], base[b, :, :length])
    # The gate is open on mask rows: other adapters, other drafts, other numbers of acceptances.
    assert len(histories) == len(states)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_leave_the_logits_of_clean_rows_bit_for_bit(layout: str) -> None:
    policy = make_policy(STRIDE, layout)
    for rounds in (0, 3):
        state = run(adapters()["random"], policy, rounds)
        logits = {
            name: np.asarray(window_logits(drafting_model(adapter), state, policy, MASK))
            for name, adapter in adapters().items()
        }
        base = logits.pop("none")
        for name, ours in logits.items():
            np.testing.assert_array_equal(ours[:, :STRIDE], base[:, :STRIDE], err_msg=name)
            assert (np.abs(ours[:, STRIDE:] - base[:, STRIDE:]).max(axis=2) > 1e-3).all(), name


def test_the_mask_embedding_is_that_of_mask_rows_alone() -> None:
    policy, zero = make_policy(STRIDE, "standard"), drafting_adapter(b_scale=0.0)
    state = run(zero, policy, 0)
    # Clean rows that hold the mask token: request 2 begins with it; let request 3 verify it as a draft.
    drafts = replace(state.drafts, tokens=state.drafts.tokens.at[3, 1].set(MASK))
    state = replace(state, drafts=drafts, warm=state.warm.at[3].set(True))
    assert int(state.pending[2]) == MASK

    base = drafting_model()
    looks_like_7 = Adapter(zero.config, {**zero.params, "mask_embedding": base.embedding[...][7]})
    gated = np.asarray(window_logits(drafting_model(looks_like_7), state, policy, MASK))
    plain = np.asarray(window_logits(base, state, policy, MASK))
    np.testing.assert_array_equal(gated[:, :STRIDE], plain[:, :STRIDE])
    # With zero matrices, the mask rows are those of the base model fed token 7 in their place.
    fed_7 = np.asarray(window_logits(base, state, policy, 7))
    np.testing.assert_allclose(gated[:, STRIDE:], fed_7[:, STRIDE:], atol=1e-5)
    assert np.abs(gated[:, STRIDE:] - plain[:, STRIDE:]).max() > 1e-2
