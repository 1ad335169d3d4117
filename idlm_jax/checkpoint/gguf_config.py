"""The Hugging Face config.json that the metadata of a GGUF file stands for.

Keys are llama.cpp's (``{architecture}.attention.head_count`` …). What a supported family would need and this backbone
does not compute is refused by the name of its key.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from idlm_jax.errors import UserError, did_you_mean

# general.architecture to the class that transformers loads; the family has the architecture's name.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Keys that change the arithmetic; absent, zero or one means "not used".
REFUSED_KEYS = (
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.layer_norm_epsilon",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)


def hf_config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """config.json of a GGUF file with this metadata and these tensors; raises UserError naming what is unsupported."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{where}: architecture '{architecture}' is not supported (supported: {', '.join(ARCHITECTURES)})"
            + did_you_mean(str(architecture), ARCHITECTURES)
        )
    reader = _Reader(metadata, architecture, where)
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{where}: 'rope_freqs.weight' (Llama 3 rope scaling, folded into a tensor) is not supported in GGUF; "
            "convert the Hugging Face checkpoint of this model instead"
        )
    for key in REFUSED_KEYS:
        if reader.get(key) not in (None, 0, 1):
            raise UserError(f"{where}: '{architecture}.{key}' = {reader.get(key)!r} is not supported")
    if "token_embd.weight" not in shapes:
        raise UserError(f"{where}: tensor 'token_embd.weight' is missing")
    context = reader.integer("context_length")
    window = reader.get("attention.sliding_window") or context
    if window < context:
        raise UserError(f"{where}: '{architecture}.attention.sliding_window' = {window} is not supported")
    heads = reader.integer("attention.head_count")
    layers = reader.integer("block_count")
    if layers > len(shapes):  # a damaged count must not make us list the tensors of a billion layers
        raise reader.error("block_count", f"says {layers} layers, but the file has {len(shapes)} tensors in all")
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": reader.integer("embedding_length"),
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": _head_dim(reader, heads),
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": reader.decimal("attention.layer_norm_rms_epsilon"),
        **_rope(reader),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_cache": True,
        **token_ids(metadata),
    }


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos, pad and mask ids under their config.json names; several ends of text become a list."""
    found = {}
    for key, name in (("bos", "bos"), ("padding", "pad"), ("mask", "mask")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            found[f"{name}_token_id"] = value
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found


class _Reader:
    """Metadata of one architecture, with clear errors."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str):
        self.metadata = metadata
        self.architecture = architecture
        self.where = where

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key) if self.get(key) is not None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, f"must be one positive integer, not {_short(value)}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that means it: 1e-05, not 9.99999974e-06."""
        value = self.get(key) if self.get(key) is not None else default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, f"must be one positive number, not {_short(value)}")
        return float(str(np.float32(value)))

    def error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.where}: '{self.architecture}.{key}' {text}")


def _short(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)


def _head_dim(reader: _Reader, heads: int) -> int:
    head_dim = reader.integer("attention.key_length", reader.integer("embedding_length") // heads)
    if reader.integer("rope.dimension_count", head_dim) != head_dim:
        raise reader.error("rope.dimension_count", f"other than the head size {head_dim} is not supported")
    if reader.integer("attention.value_length", head_dim) != head_dim:
        raise reader.error("attention.value_length", f"other than the key length {head_dim} is not supported")
    return head_dim


def _rope(reader: _Reader) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": reader.decimal("rope.freq_base", 10_000.0), "rope_scaling": None}
    kind = reader.get("rope.scaling.type")
    if kind is None and reader.get("rope.scale_linear") not in (None, 0, 1):
        kind, factor_key = "linear", "rope.scale_linear"  # as files of 2023 say it
    else:
        factor_key = "rope.scaling.factor"
    if kind in (None, "none"):
        return rope
    if kind not in ("linear", "yarn"):
        raise reader.error("rope.scaling.type", f"= '{kind}' is not supported (supported: none, linear, yarn)")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": reader.decimal(factor_key)}
    if kind == "yarn":
        original = reader.integer("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
        for key in ("beta_fast", "beta_slow"):
            if reader.get(f"rope.scaling.yarn_{key}") is not None:
                scaling[key] = reader.decimal(f"rope.scaling.yarn_{key}")
    return {**rope, "rope_scaling": scaling}
