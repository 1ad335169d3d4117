"""PEFT LoRA directories: parity with PEFT's own logits, byte-equal round trips, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from idlm_jax.backbone.adapter import TARGET_MODULES, Adapter, AdapterConfig, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import Params, stack_layers
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter, save_adapter
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError
from tests.support import GOLDEN, relative_error

BASE = GOLDEN / "qwen3_tied"
ADAPTERS = ["peft_r8", "peft_qv_r4"]
CONFIG = open_source(BASE).config
WEIGHTS = "adapter_model.safetensors"


def _logits(config: ModelConfig, params: Params, adapter: Adapter, tokens: np.ndarray) -> np.ndarray:
    model = Qwen3(config, params, adapter.astype(jnp.float32))
    return np.asarray(jax.jit(causal_logits, static_argnums=2)(model, jnp.asarray(tokens), 0))


def _copy(name: str, target: Path, **changes: Any) -> Path:
    """A golden adapter with some settings changed."""
    shutil.copytree(GOLDEN / name, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


def _refusal(path: Path, config: ModelConfig = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        load_adapter(path, config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def _assert_equal(a: Adapter, b: Adapter) -> None:
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert [leaf.dtype for leaf in jax.tree.leaves(a.params)] == [leaf.dtype for leaf in jax.tree.leaves(b.params)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_with_the_adapter_on_all_rows_equal_those_of_peft(name: str) -> None:
    golden, source = load_file(GOLDEN / name / "golden.safetensors"), open_source(BASE)
    adapter = load_adapter(GOLDEN / name, source.config)
    logits = _logits(source.config, load_params(source, jnp.float32), adapter, golden["input_ids"])
    assert relative_error(logits, golden["logits"]) < 2e-4


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_peft_directory_comes_back_with_the_same_bytes_of_weights(name: str, tmp_path: Path) -> None:
    adapter = load_adapter(GOLDEN / name, CONFIG)
    save_adapter(adapter, tmp_path / "out")
    assert sorted(_files(tmp_path / "out")) == ["adapter_config.json", WEIGHTS]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (GOLDEN / name / WEIGHTS).read_bytes()
    ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path / "out", GOLDEN / name))
    assert ours == {key: theirs[key] for key in ours}


@settings(deadline=None)
@given(
    rank=st.integers(1, 160),
    alpha=st.one_of(st.integers(1, 512), st.floats(0.1, 100)),
    targets=st.sets(st.sampled_from(sorted(TARGET_MODULES)), min_size=1),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    mask_token_id=st.one_of(st.none(), st.integers(0, CONFIG.vocab_size - 1)),
    has_embedding=st.booleans(),
)
def test_any_adapter_survives_writing_and_reading(
    rank: int,
    alpha: float,
    targets: set[str],
    use_rslora: bool,
    dtype: Any,
    mask_token_id: int | None,
    has_embedding: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    names = tuple(name for name in TARGET_MODULES if name in targets)
    config = AdapterConfig(rank, alpha, names, use_rslora, mask_token_id, "some/base")
    adapter = _random_adapter(config, dtype, has_embedding)
    folder = tmp_path_factory.mktemp("peft")
    save_adapter(adapter, folder / "a")
    again = load_adapter(folder / "a", CONFIG)
    assert again.config == config
    _assert_equal(adapter, again)
    save_adapter(again, folder / "b")
    assert _files(folder / "a") == _files(folder / "b")


def _random_adapter(config: AdapterConfig, dtype: Any, has_embedding: bool) -> Adapter:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapter(CONFIG, config, jax.random.key(0), jnp.float32).params)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), shapes)
    if has_embedding:
        params["mask_embedding"] = rng.standard_normal(CONFIG.hidden_size).astype(dtype)
    return Adapter(config, params)


def test_stacked_layers_are_written_like_unstacked_ones(tmp_path: Path) -> None:
    adapter = _random_adapter(AdapterConfig(4, 8), np.float32, has_embedding=True)
    save_adapter(adapter, tmp_path / "a")
    save_adapter(Adapter(adapter.config, stack_layers(adapter.params)), tmp_path / "b")
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_the_official_layout_loads(tmp_path: Path) -> None:
    """Rank 128, alpha 256, all seven projections, bfloat16, and the settings that LLaMA-Factory's PEFT writes."""
    rng = np.random.default_rng(1)
    tensors = {}
    sizes = {"q_proj": (32, 64), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (64, 32)}
    sizes |= {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    for layer in range(CONFIG.num_hidden_layers):
        for name, (inputs, outputs) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{TARGET_MODULES[name]}.{name}"
            for side, shape in (("A", (128, inputs)), ("B", (outputs, 128))):
                tensors[f"{prefix}.lora_{side}.weight"] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    path = _copy("peft_r8", tmp_path / "official", r=128, lora_alpha=256, base_model_name_or_path="Qwen/Qwen3-8B")
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    adapter = load_adapter(path, CONFIG)
    assert adapter.config.scale == 2.0
    assert adapter.config.target_modules == tuple(TARGET_MODULES)
    pair = adapter.params["layers"][1]["mlp"]["down_proj"]
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(pair["a"], tensors[f"{prefix}.lora_A.weight"].T)
    np.testing.assert_array_equal(pair["b"], tensors[f"{prefix}.lora_B.weight"].T)
    save_adapter(adapter, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (path / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("peft_r8", "all-linear"),
        ("peft_r8", r".*\.(self_attn|mlp)\.\w+_proj"),
        ("peft_qv_r4", ["self_attn.q_proj", "v_proj"]),
        ("peft_qv_r4", r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
    ],
)
def test_target_modules_match_as_in_peft(name: str, wanted: Any, tmp_path: Path) -> None:
    adapter = load_adapter(_copy(name, tmp_path / "a", target_modules=wanted), CONFIG)
    assert adapter.config.target_modules == load_adapter(GOLDEN / name, CONFIG).config.target_modules


def test_excluded_modules_are_not_targets(tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj"]
    path = _copy("peft_qv_r4", tmp_path / "a", target_modules=targets, exclude_modules=["k_proj"])
    assert load_adapter(path, CONFIG).config.target_modules == ("q_proj", "v_proj")


def test_mask_embedding_and_mask_token_ride_along(tmp_path: Path) -> None:
    config = AdapterConfig(4, 8, ("q_proj",), mask_token_id=3)
    adapter = _random_adapter(config, np.float32, has_embedding=True)
    save_adapter(adapter, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "idlm_adapter.json").read_text()) == {"format": 1, "mask_token_id": 3}
    again = load_adapter(tmp_path / "a", CONFIG)
    assert again.config.mask_token_id == 3
    np.testing.assert_array_equal(again.params["mask_embedding"], adapter.params["mask_embedding"])
    assert "mask" not in (tmp_path / "a" / "adapter_config.json").read_text()


def test_an_existing_target_is_kept_unless_overwriting(tmp_path: Path) -> None:
    first, second = load_adapter(GOLDEN / "peft_r8", CONFIG), load_adapter(GOLDEN / "peft_qv_r4", CONFIG)
    save_adapter(first, tmp_path / "a")
    before = _files(tmp_path / "a")
    with pytest.raises(UserError, match="exists already"):
        save_adapter(second, tmp_path / "a")
    assert _files(tmp_path / "a") == before
    save_adapter(second, tmp_path / "a", overwrite=True)
    assert load_adapter(tmp_path / "a", CONFIG).config == second.config
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "'use_dora' = True is not supported"),
        ({"bias": "lora_only"}, "'bias' = 'lora_only'"),
        ({"modules_to_save": ["embed_tokens"]}, "'modules_to_save'"),
        ({"rank_pattern": {"q_proj": 4}}, "'rank_pattern'"),
        ({"alpha_pattern": {"q_proj": 4}}, "'alpha_pattern'"),
        ({"layers_to_transform": [0]}, "'layers_to_transform'"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out'"),
        ({"lora_bias": True}, "'lora_bias'"),
        ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens'"),
        ({"a_setting_of_the_future": 1}, "'a_setting_of_the_future' = 1 is not supported"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' = 'pissa'"),
        ({"r": 0}, "'r' must be a positive integer"),
        ({"r": 4}, "says rank 4"),
        ({"lora_alpha": "16"}, "'lora_alpha' must be a number"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'?"),
        ({"target_modules": []}, "'target_modules'"),
        ({"target_modules": "(unclosed"}, "not a regular expression"),
        ({"target_modules": ["q_proj", "lm_head"]}, "selects lm_head"),
        ({"target_modules": r"model\.layers\.0\..*_proj"}, "same projections in every layer"),
        ({"target_modules": ["q_proj"]}, "that 'target_modules' does not select"),
    ],
)
def test_settings_that_this_backbone_does_not_compute_are_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in _refusal(_copy("peft_r8", tmp_path / "a", **changes))


def test_missing_and_unexpected_matrices_are_named(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "peft_r8" / WEIGHTS)
    dropped = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    path = _copy("peft_r8", tmp_path / "a")
    save_file({name: array for name, array in tensors.items() if name != dropped}, path / WEIGHTS)
    assert f"missing 1 tensor ({dropped})" in _refusal(path)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.ones((8, 32), np.float32)}, path / WEIGHTS)
    assert "unexpected 1 tensor (base_model.model.lm_head.lora_A.weight)" in _refusal(path)
    save_file({name: array.astype(np.int32) for name, array in tensors.items()}, path / WEIGHTS)
    assert "dtype I32" in _refusal(path)


def test_an_adapter_for_another_model_is_refused() -> None:
    path = GOLDEN / "peft_r8"
    assert "2 layers, the model has 3" in _refusal(path, CONFIG.replace(num_hidden_layers=3))
    assert "adapter for another model" in _refusal(path, CONFIG.replace(hidden_size=64))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", "{", "not valid JSON"),
        (WEIGHTS, "short", "damaged or truncated"),
        ("mask_embedding.safetensors", "short", "damaged or truncated"),
        ("idlm_adapter.json", '{"format": 2}', "format 2 is not known"),
        ("idlm_adapter.json", '{"format": 1, "mask_token": 3}', "did you mean 'mask_token_id'?"),
        ("idlm_adapter.json", '{"format": 1, "mask_token_id": 96}', "outside the vocabulary of 96"),
    ],
)
def test_damaged_files_are_named(file: str, content: str, words: str, tmp_path: Path) -> None:
    path = _copy("peft_r8", tmp_path / "a")
    (path / file).write_text(content)
    message = _refusal(path)
    assert words in message
    assert file in message


def test_what_is_not_an_adapter_directory_is_explained(tmp_path: Path) -> None:
    assert "no adapter_config.json" in _refusal(BASE)
    assert "no such" in _refusal(tmp_path / "absent")
    path = _copy("peft_r8", tmp_path / "a")
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    assert "adapter_model.bin" in _refusal(path)
    (path / "adapter_model.bin").unlink()
    assert "cannot read" in _refusal(path)


def test_a_mask_embedding_of_another_size_is_refused(tmp_path: Path) -> None:
    path = _copy("peft_r8", tmp_path / "a")
    save_file({"mask_embedding": np.ones(31, np.float32)}, path / "mask_embedding.safetensors")
    assert "mask embedding of shape (31,)" in _refusal(path)
    save_file({"embedding": np.ones(32, np.float32)}, path / "mask_embedding.safetensors")
    assert "named 'mask_embedding'" in _refusal(path)
