"""Tiny Hugging Face checkpoints of every family and RoPE type, each with the logits PyTorch computes from it."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from golden.common import VOCAB, forward, load, make_input_ids, randomise, write_json, write_tensors

FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILY_SHAPE: dict[str, dict[str, Any]] = {
    # 4 heads of 16 are not the hidden size: head_dim must come from the config.
    "qwen3": {"head_dim": 16, "rms_norm_eps": 1e-6},
    # Qwen2 configs carry no head_dim; an odd number of heads over one K/V head.
    "qwen2": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    "llama": {"head_dim": 16, "rms_norm_eps": 1e-5},
}
THETA = {"qwen3": 1e6, "qwen2": 1e6, "llama": 1e4}
# Each scaled RoPE must move the logits (whose std is 1) at least this far from the unscaled one.
MIN_ROPE_EFFECT = 0.3


@dataclass(frozen=True)
class Case:
    """One checkpoint to write."""

    name: str  # folder under tests/golden
    family: str  # key of FAMILIES
    seed: int  # of the weights
    tied: bool = False  # tied embeddings
    rope: dict[str, Any] = field(default_factory=dict)  # `rope_parameters` beyond the default type and theta
    extra: dict[str, Any] = field(default_factory=dict)  # further config keys
    dtype: torch.dtype = torch.float32  # of the stored weights
    max_shard_size: str = "1GB"  # small values make an index file appear


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 100.0}
CASES = (
    Case("qwen3_tied", "qwen3", 10, tied=True),
    Case("qwen3_untied", "qwen3", 11),
    Case("sdar", "qwen3", 12),
    Case("qwen2_tied", "qwen2", 13, tied=True),
    Case("qwen2_untied", "qwen2", 14),
    Case("llama_tied", "llama", 15, tied=True),
    Case("llama_untied_bias", "llama", 16, extra={"attention_bias": True, "mlp_bias": False}),
    Case("llama_rope_linear", "llama", 17, tied=True, rope={"rope_type": "linear", "factor": 4.0}),
    Case(
        "llama_rope_llama3",
        "llama",
        18,
        tied=True,
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    # Defaults only: beta_fast 32, beta_slow 1, truncate true, attention factor 0.1 ln(factor) + 1.
    Case("qwen3_rope_yarn", "qwen3", 19, tied=True, rope=_YARN),
    # attention_factor given: it replaces the default factor; a ramp that starts above zero.
    Case(
        "llama_rope_yarn",
        "llama",
        20,
        tied=True,
        rope=_YARN | {"attention_factor": 1.25, "beta_fast": 2.0, "beta_slow": 0.5},
    ),
    # mscale pair: the factor is their ratio; truncate false: fractional ramp bounds.
    Case(
        "llama_rope_yarn_mscale",
        "llama",
        21,
        tied=True,
        rope=_YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 4.0, "beta_slow": 1.0},
    ),
    Case("qwen3_bf16", "qwen3", 22, dtype=torch.bfloat16),
    Case("qwen3_sharded", "qwen3", 23, max_shard_size="40KB"),
)


def build(case: Case, rope: dict[str, Any]) -> PreTrainedModel:
    """The model of a case with its seeded weights, under the given RoPE parameters."""
    config_class, model_class = FAMILIES[case.family]
    parameters = {"rope_type": "default", "rope_theta": THETA[case.family]} | rope
    shape = SHAPE | FAMILY_SHAPE[case.family] | case.extra
    config = config_class(**shape, tie_word_embeddings=case.tied, rope_parameters=parameters)
    config._attn_implementation = "eager"
    model = model_class(config)
    randomise(model, case.seed)
    return model


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 wrote it: top-level `rope_theta`, `rope_scaling`, `torch_dtype`."""
    old = copy.deepcopy(config)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.52.4"
    for newer in ("layer_types", "pad_token_id"):
        old.pop(newer, None)
    return old


def sdar_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Qwen3 config rewritten with the keys of the official I-DLM checkpoints."""
    return old_spelling(config) | {
        "architectures": ["SDARForCausalLM"],
        "attn_implementation": "flex_attention",
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": 3,
        "fuse_cross_entropy": True,
        "mask_token_id": 90,
        "model_type": "sdar",
        "use_cache": False,
    }


def golden_tensors(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """Read the written folder back and compute what a loader must reproduce from it."""
    model, input_ids = load(folder), make_input_ids()
    rotary = model.model.rotary_emb
    tensors = {
        "input_ids": input_ids,
        "logits": forward(model, input_ids),
        "inv_freq": rotary.inv_freq.float(),
        "attention_scaling": torch.tensor([rotary.attention_scaling], dtype=torch.float32),
    }
    if case.dtype == torch.bfloat16:
        tensors["logits_bf16"] = forward(load(folder, torch.bfloat16), input_ids)
    if case.rope:
        # Load the default-RoPE twin from the same file: only the frequencies may differ.
        twin = load(
            folder, rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}
        )
        effect = (forward(twin, input_ids) - tensors["logits"]).abs().max().item()
        if effect < MIN_ROPE_EFFECT:
            raise AssertionError(f"{case.name}: the scaled RoPE changes the logits by {effect:.3f} only")
    return tensors


def check_old_spelling(case: Case, folder: Path, old: dict[str, Any]) -> None:
    """The old spelling must mean the same RoPE to transformers."""
    config_class, _ = FAMILIES[case.family]
    new = config_class.from_pretrained(folder).rope_parameters
    if config_class.from_dict(copy.deepcopy(old)).rope_parameters != new:
        raise AssertionError(f"{case.name}: the old spelling reads differently")


def write_case(case: Case, out: Path) -> None:
    """Write one folder: the checkpoint, `golden.safetensors` and, with a scaled RoPE, `config_old.json`."""
    folder = out / case.name
    model = build(case, case.rope).to(case.dtype)
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    tensors = golden_tensors(case, folder)
    config = model.config.to_diff_dict() | {"dtype": str(case.dtype).removeprefix("torch.")}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if case.rope:
        old = old_spelling(config)
        check_old_spelling(case, folder, old)
        write_json(folder / "config_old.json", old)
    if case.name == "sdar":
        write_json(folder / "config.json", sdar_config(config))
    write_tensors(folder / "golden.safetensors", tensors)


def write_hf_cases(out: Path) -> None:
    """Write every case of this module."""
    for case in CASES:
        write_case(case, out)
