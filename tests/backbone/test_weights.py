"""The one table of weights: names, shapes, counts, and the two layouts of the layers."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import (
    abstract_params,
    build_params,
    init_params,
    is_stacked,
    parameter_count,
    stack_layers,
    unstack_layers,
    weight_table,
)
from idlm_jax.checkpoint.hf import find_tensors
from idlm_jax.config import ModelConfig, load_yaml
from tests.checkpoint.hf_files import TINY
from tests.support import GOLDEN

MODELS = Path(__file__).parents[2] / "configs" / "models"
# As published on the model cards of the Hugging Face Hub (number of elements in the safetensors files, tied head once).
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "i-dlm-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}
FAMILIES = st.builds(
    lambda family, layers, tied, bias: ModelConfig.from_hf(
        {
            **TINY,
            "model_type": family,
            "num_hidden_layers": layers,
            "tie_word_embeddings": tied,
            "attention_bias": bias,
        }
    ),
    st.sampled_from(["qwen3", "sdar", "qwen2", "llama"]),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)


def test_every_model_configuration_has_its_published_count() -> None:
    assert {path.stem for path in MODELS.glob("*.yaml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_builds_abstractly_with_the_published_parameter_count(name: str) -> None:
    config = ModelConfig.from_hf(load_yaml(MODELS / f"{name}.yaml"), name)
    params = abstract_params(config, jnp.bfloat16)
    assert parameter_count(config) == PUBLISHED[name]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PUBLISHED[name]
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    logits = jax.eval_shape(lambda params, tokens: causal_logits(Qwen3(config, params), tokens), params, tokens)
    assert logits.shape == (1, 4, config.vocab_size)


def test_official_model_is_qwen3_8b_with_its_mask_token() -> None:
    official = ModelConfig.from_hf(load_yaml(MODELS / "i-dlm-8b.yaml"))
    base = ModelConfig.from_hf(load_yaml(MODELS / "qwen3-8b.yaml"))
    assert official.mask_token_id == 151_669
    assert official == base.replace(family="sdar")


@pytest.mark.parametrize("name", sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if p.parent.name != "gguf"))
def test_table_names_exactly_what_transformers_writes(name: str) -> None:
    config = ModelConfig.from_hf(load_yaml(GOLDEN / name / "config.json"))  # JSON is YAML
    expected = {weight.hf_name: weight.hf_shape for weight in weight_table(config)}
    assert {name: tensor.shape for name, tensor in find_tensors(GOLDEN / name).items()} == expected


@settings(deadline=None)
@given(FAMILIES)
def test_every_weight_is_declared_once_with_an_axis_a_dimension(config: ModelConfig) -> None:
    table = weight_table(config)
    assert len({weight.path for weight in table}) == len({weight.hf_name for weight in table}) == len(table)
    for weight in table:
        assert len(weight.axes) == len(weight.shape)
        assert weight.hf_shape == (weight.shape[::-1] if weight.transpose else weight.shape)
    by_path = build_params(config, lambda weight: weight.path)
    assert sorted(jax.tree.leaves(by_path)) == sorted(weight.path for weight in table)
    assert len(by_path["layers"]) == config.num_hidden_layers


@settings(max_examples=10, deadline=None)
@given(FAMILIES)
def test_stacking_and_unstacking_are_inverse(config: ModelConfig) -> None:
    params = init_params(config, jax.random.key(0), jnp.float32)
    stacked = stack_layers(params)
    assert is_stacked(stacked) and not is_stacked(params)
    for leaf in jax.tree.leaves(stacked["layers"]):
        assert leaf.shape[0] == config.num_hidden_layers
    for back in (unstack_layers(stacked), unstack_layers(stack_layers(unstack_layers(stacked)))):
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_initial_values_follow_the_table() -> None:
    config = ModelConfig.from_hf({**TINY, "model_type": "qwen2", "hidden_size": 64, "initializer_range": 0.05})
    params = init_params(config, jax.random.key(1), jnp.float32)
    attention = params["layers"][0]["self_attn"]
    assert np.all(np.asarray(attention["q_proj"]["bias"]) == 0)
    assert np.all(np.asarray(params["norm"]["scale"]) == 1)
    assert 0.045 < float(jnp.std(params["embed_tokens"]["embedding"])) < 0.055
    other = params["layers"][1]["self_attn"]["q_proj"]["kernel"]
    assert not np.array_equal(attention["q_proj"]["kernel"], other)
