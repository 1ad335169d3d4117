"""Logits equal PyTorch's, family by family and RoPE by RoPE (golden files of scripts/make_golden.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from idlm_jax.backbone.layers import rope_frequencies
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import (
    Params,
    fuse_projections,
    init_params,
    split_projections,
    stack_layers,
    unstack_layers,
)
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.config import ModelConfig
from tests.support import GOLDEN, relative_error

CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
ROPE_CASES = [case for case in CASES if "rope" in case]


def _golden(case: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / case / "golden.safetensors")


def _logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(causal_logits)(Qwen3(config, params), jnp.asarray(tokens)))


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers(case: str) -> None:
    source, golden = open_source(GOLDEN / case), _golden(case)
    logits = _logits(source.config, load_params(source, jnp.float32), golden["input_ids"])
    assert relative_error(logits, golden["logits"]) < 2e-4


def test_stacked_layers_give_the_logits_of_unstacked_ones() -> None:
    source, golden = open_source(GOLDEN / "qwen3_untied"), _golden("qwen3_untied")
    params = load_params(source, jnp.float32)
    unstacked = _logits(source.config, params, golden["input_ids"])
    np.testing.assert_allclose(_logits(source.config, stack_layers(params), golden["input_ids"]), unstacked, atol=1e-5)
    again = unstack_layers(stack_layers(params))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), params, again))


@pytest.mark.parametrize("case", ["qwen3_untied", "qwen2_tied"])
@pytest.mark.parametrize("stacked", [False, True])
def test_fused_projections_give_the_same_logits_and_split_back(case: str, stacked: bool) -> None:
    source, golden = open_source(GOLDEN / case), _golden(case)
    params = load_params(source, jnp.float32)
    before = jax.tree.map(lambda leaf: leaf, stack_layers(params) if stacked else params)
    fused = fuse_projections(jax.tree.map(lambda leaf: leaf, before))
    assert relative_error(_logits(source.config, fused, golden["input_ids"]), golden["logits"]) < 2e-4
    again = split_projections(fused, source.config)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), before, again))


def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers() -> None:
    source, golden = open_source(GOLDEN / "qwen3_bf16"), _golden("qwen3_bf16")
    logits = _logits(source.config, load_params(source), golden["input_ids"])
    ours = np.abs(logits - golden["logits"])
    theirs = np.abs(golden["logits_bf16"].astype(np.float32) - golden["logits"])
    assert ours.mean() < 1.25 * theirs.mean()
    assert ours.max() < 2 * theirs.max()


@pytest.mark.parametrize("case", ROPE_CASES)
def test_both_spellings_of_rope_settings_read_the_same(case: str) -> None:
    new, old = (json.loads((GOLDEN / case / name).read_text()) for name in ("config.json", "config_old.json"))
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


@pytest.mark.parametrize("case", CASES)
def test_rope_frequencies_equal_transformers(case: str) -> None:
    config, golden = open_source(GOLDEN / case).config, _golden(case)
    inverse, factor = rope_frequencies(config.rope, config.head_dim)
    np.testing.assert_allclose(inverse, golden["inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(factor, golden["attention_scaling"][0], rtol=1e-6)


def test_initialisation_follows_the_table() -> None:
    config = ModelConfig.from_hf(json.loads(Path(GOLDEN / "qwen2_tied" / "config.json").read_text()))
    params = init_params(config, jax.random.key(0), jnp.float32)
    attention = params["layers"][1]["self_attn"]
    assert float(jnp.std(attention["q_proj"]["kernel"])) == pytest.approx(config.initializer_range, rel=0.1)
    assert not attention["q_proj"]["bias"].any()
    assert (params["norm"]["scale"] == 1).all()
    assert not jnp.array_equal(attention["q_proj"]["kernel"], params["layers"][0]["self_attn"]["q_proj"]["kernel"])
