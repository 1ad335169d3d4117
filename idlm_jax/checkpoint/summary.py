"""What ``idlm info`` prints, as data: configuration, one row a tensor, and memory."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from idlm_jax.backbone.weights import Weight, parameter_count, weight_table
from idlm_jax.checkpoint import companions
from idlm_jax.checkpoint.open import open_source
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.errors import UserError


@dataclass(frozen=True)
class TensorRow:
    """One tensor, or the same tensor of several layers."""

    # Path in our tree, with {i} for the layer where several are folded into one row.
    name: str
    # Shape and axes of one of them.
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    # As loaded, with the type in the file in front where loading de-quantises.
    dtype: str
    # Number of tensors, and the bytes of all.
    count: int
    size: int


@dataclass(frozen=True)
class Summary:
    """A checkpoint or a configuration at a glance."""

    path: str
    # Kind of source, or "configuration" where there are no weights.
    kind: str
    config: ModelConfig
    rows: list[TensorRow]
    parameters: int
    # Bytes of all weights in memory.
    size: int
    # Dtype of the activations and so of the KV cache: that of the embedding.
    cache_dtype: np.dtype


def summarize(path_or_hub_id: str | Path, fold: bool = True) -> Summary:
    """Describe a checkpoint, a Hub model, a bare config.json or a YAML file; ``fold`` makes one row of all layers."""
    path = Path(path_or_hub_id)
    if path.suffix in (".json", ".yaml", ".yml"):
        hf, config = _read(path), read_config(path)
        dtype = _config_dtype(hf, path)
        return _summary(str(path), "configuration", config, lambda weight: (dtype, dtype.name), fold)
    source = open_source(path_or_hub_id)
    # What a GGUF file calls the types it holds.
    stored_type: Callable[[Weight], str] | None = getattr(source, "stored_type", None)

    def describe(weight: Weight) -> tuple[np.dtype, str]:
        dtype = source.stored_dtype(weight)
        return dtype, dtype.name if stored_type is None else f"{stored_type(weight)} → {dtype.name}"

    return _summary(str(path_or_hub_id), source.kind, source.config, describe, fold)


def read_config(path: Path) -> ModelConfig:
    """The model that a bare config.json or a YAML file describes; raises UserError."""
    return ModelConfig.from_hf(_read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    return companions.read_json(path) if path.suffix == ".json" else load_yaml(path)


def kv_cache_size(config: ModelConfig, dtype: np.dtype, batch: int, length: int) -> int:
    """Bytes of keys and values of ``batch`` requests of ``length`` tokens."""
    slot = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return batch * length * config.num_hidden_layers * slot


def _summary(
    path: str, kind: str, config: ModelConfig, describe: Callable[[Weight], tuple[np.dtype, str]], fold: bool
) -> Summary:
    rows: dict[tuple[str, str], TensorRow] = {}
    for weight in weight_table(config):
        dtype, text = describe(weight)
        name = re.sub(r"^layers\.\d+\.", "layers.{i}.", weight.path) if fold else weight.path
        before = rows.get((name, text), TensorRow(name, weight.shape, weight.axes, text, 0, 0))
        size = before.size + weight.size * dtype.itemsize
        rows[name, text] = TensorRow(name, weight.shape, weight.axes, text, before.count + 1, size)
    total = sum(row.size for row in rows.values())
    embedding_dtype = describe(weight_table(config)[0])[0]
    return Summary(path, kind, config, list(rows.values()), parameter_count(config), total, embedding_dtype)


def _config_dtype(hf: dict[str, Any], path: Path) -> np.dtype:
    name = hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"
    try:
        return np.dtype(jnp.dtype(name))
    except TypeError:
        raise UserError(f"{path}: unknown dtype {name!r}") from None
