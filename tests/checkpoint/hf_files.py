"""Small Hugging Face directories of random bits, written by the safetensors library itself."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from idlm_jax.backbone.weights import weight_table
from idlm_jax.config import ModelConfig

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}

TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "dtype": "float32",
}


def random_tensors(hf: dict[str, Any], dtypes: tuple[str, ...] = ("float32",), seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits (so also infinities and NaN) for every tensor of a config, taking turns with the dtypes."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for i, weight in enumerate(weight_table(ModelConfig.from_hf(hf))):
        dtype = DTYPES[dtypes[i % len(dtypes)]]
        bits = np.frombuffer(rng.bytes(weight.size * dtype.itemsize), dtype)
        tensors[weight.hf_name] = bits.reshape(weight.hf_shape)
    return tensors


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file."""
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file, {"format": "pt"})


def write_checkpoint(
    directory: Path, hf: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, shards: int = 0
) -> Path:
    """A directory with config.json and one file, or that many shards and their index; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    tensors = random_tensors(hf) if tensors is None else tensors
    if not shards:
        write_tensors(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write_tensors(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def raw_bytes(array: np.ndarray) -> bytes:
    """What equality of random bits means: NaN equals itself."""
    return np.ascontiguousarray(array).tobytes()
