"""Writes small GGUF files for the tests, as llama.cpp's converter would."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file

from idlm_jax.checkpoint.gguf import gguf_name

_VALUE_TYPES = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}


def metadata_of(hf: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a model with this config.json, without a tokenizer."""
    arch = hf["model_type"]
    heads = hf["num_attention_heads"]
    rope = hf["rope_parameters"]
    values = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf.get("head_dim") or hf["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] != "default":
        values["rope.scaling.type"] = rope["rope_type"]
        values["rope.scaling.factor"] = float(rope["factor"])
        if "original_max_position_embeddings" in rope:
            values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{arch}.{key}": value for key, value in values.items()}


def write_gguf(
    path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Quant]]
) -> Path:
    """Write metadata and tensors (stored bytes and type) as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
    for name, (data, quant) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k (weights and biases) for `llama`: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(directory: Path) -> dict[str, tuple[np.ndarray, Quant]]:
    """The tensors of a Hugging Face directory, in float32, as a GGUF file holds them."""
    hf = json.loads((directory / "config.json").read_text())
    heads = {"q_proj": hf["num_attention_heads"], "k_proj": hf["num_key_value_heads"]}
    tensors = {}
    for name, array in load_file(directory / "model.safetensors").items():
        count = heads.get(name.split(".")[-2]) if hf["model_type"] == "llama" else None
        tensors[gguf_name(name)] = (permute(array, count) if count else array, Quant.F32)
    return tensors


def from_huggingface(directory: Path, path: Path, **changes: Any) -> Path:
    """A GGUF file with the model of a Hugging Face directory; ``changes`` of the metadata, without architecture."""
    hf = json.loads((directory / "config.json").read_text())
    metadata = metadata_of(hf) | {f"{hf['model_type']}.{key}": value for key, value in changes.items()}
    return write_gguf(path, hf["model_type"], metadata, tensors_of(directory))
