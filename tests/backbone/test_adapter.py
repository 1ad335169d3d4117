"""The gated adapter: which rows it touches, what it adds, and which models it fits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.adapter import TARGET_MODULES, Adapter, AdapterConfig, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import Params, stack_layers
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError
from tests.support import GOLDEN, relative_error

SOURCE = open_source(GOLDEN / "qwen3_untied")
CONFIG = SOURCE.config.replace(mask_token_id=3)
TOKENS = jnp.asarray([[5, 9, 2, 7, 3, 3, 3], [1, 3, 8, 4, 3, 3, 3]])
MASKS_FROM = 4


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(SOURCE, jnp.float32)


def _adapter(b_scale: float = 0.3, mask_embedding: bool = False, **settings: object) -> Adapter:
    config = AdapterConfig(**{"rank": 4, "alpha": 8.0, **settings})
    adapter = init_adapter(CONFIG, config, jax.random.key(0), jnp.float32, b_scale)
    if mask_embedding:
        adapter.params["mask_embedding"] = jnp.linspace(-1, 1, CONFIG.hidden_size)
    return adapter


def _logits(params: Params, adapter: Adapter | None, adapter_from: int | None = None) -> np.ndarray:
    model = Qwen3(CONFIG, params, adapter)
    return np.asarray(jax.jit(causal_logits, static_argnums=2)(model, TOKENS, adapter_from))


@pytest.mark.parametrize("mask_embedding", [False, True])
def test_rows_before_the_gate_do_not_depend_on_the_adapter_bit_for_bit(params: Params, mask_embedding: bool) -> None:
    random = _logits(params, _adapter(0.3, mask_embedding), MASKS_FROM)
    zero = _logits(params, _adapter(0.0, mask_embedding), MASKS_FROM)
    np.testing.assert_array_equal(random[:, :MASKS_FROM], zero[:, :MASKS_FROM])
    assert relative_error(random[:, MASKS_FROM:], zero[:, MASKS_FROM:]) > 0.1


def test_a_closed_gate_gives_the_base_model_bit_for_bit(params: Params) -> None:
    np.testing.assert_array_equal(_logits(params, _adapter(mask_embedding=True), None), _logits(params, None))


def test_a_fresh_adapter_changes_nothing(params: Params) -> None:
    np.testing.assert_array_equal(_logits(params, _adapter(0.0), 0), _logits(params, None))


@pytest.mark.parametrize(("name", "use_rslora"), [*((name, False) for name in TARGET_MODULES), ("q_proj", True)])
def test_each_projection_equals_the_merged_weights(params: Params, name: str, use_rslora: bool) -> None:
    adapter = _adapter(target_modules=(name,), use_rslora=use_rslora)
    scale = 8 / math.sqrt(4) if use_rslora else 8 / 4
    merged = {**params, "layers": []}
    for layer, lora in zip(params["layers"], adapter.params["layers"], strict=True):
        module, pair = TARGET_MODULES[name], lora[TARGET_MODULES[name]][name]
        kernel = layer[module][name]["kernel"] + scale * jnp.matmul(pair["a"], pair["b"], precision="highest")
        projection = {**layer[module][name], "kernel": kernel}
        merged["layers"].append({**layer, module: {**layer[module], name: projection}})
    assert relative_error(_logits(params, adapter, 0), _logits(merged, None)) < 2e-4
    assert relative_error(_logits(params, adapter, 0), _logits(params, None)) > 1e-2


def test_mask_embedding_replaces_the_mask_token_on_adapted_rows_only(params: Params) -> None:
    adapter = _adapter(0.0, mask_embedding=True)
    gated, base = _logits(params, adapter, MASKS_FROM), _logits(params, None)
    # The second token of the second text is a mask token before the gate: it keeps the base model's embedding.
    np.testing.assert_array_equal(gated[:, :MASKS_FROM], base[:, :MASKS_FROM])
    table = params["embed_tokens"]["embedding"].at[3].set(adapter.params["mask_embedding"])
    replaced = _logits({**params, "embed_tokens": {"embedding": table}}, None)
    np.testing.assert_allclose(gated[0], replaced[0], atol=1e-5)  # the first text has masks behind the gate only
    assert relative_error(gated[1], replaced[1]) > 1e-2


def test_stacked_layers_take_a_stacked_adapter(params: Params) -> None:
    adapter = _adapter()
    stacked = Adapter(adapter.config, stack_layers(adapter.params))
    expected = _logits(params, adapter, MASKS_FROM)
    np.testing.assert_allclose(_logits(stack_layers(params), stacked, MASKS_FROM), expected, atol=1e-5)


def test_fresh_matrices_are_drawn_as_peft_draws_them() -> None:
    config = CONFIG.replace(hidden_size=1024, intermediate_size=256)
    adapter = init_adapter(config, AdapterConfig(64, 128.0), jax.random.key(1), jnp.float32)
    for name, inputs in (("q_proj", 1024), ("down_proj", 256)):
        pair = adapter.params["layers"][0][TARGET_MODULES[name]][name]
        bound = 1 / math.sqrt(inputs)
        assert float(jnp.abs(pair["a"]).max()) <= bound
        assert float(pair["a"].std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not pair["b"].any()
    leaves = jax.tree.leaves(adapter.params["layers"][0]["self_attn"])
    assert not any(jnp.array_equal(a, b) for a in leaves[::2] for b in leaves[::2] if a is not b and a.shape == b.shape)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIG.replace(num_hidden_layers=3), "2 layers, the model has 3"),
        (
            CONFIG.replace(intermediate_size=32),
            r"layers.0.mlp.down_proj.a has shape \(64, 4\), the model needs \(32, 4\)",
        ),
        (CONFIG.replace(num_key_value_heads=4), r"k_proj.b has shape"),
        (CONFIG.replace(hidden_size=64), "mask embedding of shape"),
    ],
)
def test_an_adapter_for_another_model_is_refused_naming_what_differs(config: ModelConfig, words: str) -> None:
    with pytest.raises(UserError, match=rf"^here: adapter for another model: .*{words}"):
        _adapter(mask_embedding=True).check_fits(config, "here")
    _adapter(mask_embedding=True).check_fits(CONFIG, "here")


def test_senseless_settings_are_refused() -> None:
    with pytest.raises(UserError, match="rank must be at least 1"):
        AdapterConfig(0, 1.0).validate("here")
    with pytest.raises(UserError, match="unknown target module 'qproj'; did you mean 'q_proj'"):
        AdapterConfig(4, 1.0, ("qproj",)).validate("here")
