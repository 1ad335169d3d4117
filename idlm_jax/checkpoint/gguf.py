"""GGUF files (llama.cpp's format) as a source of weights, tokenizer and config.

Tensors are read and de-quantised one at a time, the latter by the ``gguf`` library. For the ``llama`` architecture the
rows of q and k are stored in the order of interleaved RoPE; reading restores the Hugging Face order.
"""

import importlib
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from idlm_jax.backbone.weights import Weight, weight_table
from idlm_jax.checkpoint import companions
from idlm_jax.checkpoint.gguf_config import hf_config_from_gguf
from idlm_jax.checkpoint.gguf_header import TensorEntry, read_header
from idlm_jax.checkpoint.gguf_tokenizer import build_tokenizer, has_tokenizer, save_tokenizer
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Hugging Face module to llama.cpp's name, outside and inside a layer.
MODULE_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_MODULE_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Types that are read as they are; every other type is de-quantised to float32.
FLOAT_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# De-quantised at a time: keeps the library's temporaries small beside the tensor.
CHUNK_BYTES = 1 << 24
# Names listed in an error before "and N more".
NAMES_SHOWN = 4


@dataclass(frozen=True)
class _TensorType:
    """How the bytes of one ggml type lie."""

    quant: Any  # gguf.GGMLQuantizationType
    # None for quantised types
    float_dtype: np.dtype | None
    elements_per_block: int
    bytes_per_block: int


class GGUFSource:
    """An opened GGUF file; opening checks names, shapes, types and the length of the file. A ``WeightSource``."""

    kind = "gguf"

    def __init__(self, path: Path):
        self.path = Path(path)
        self._library = import_gguf()
        header = read_header(self.path)
        self.metadata = header.metadata
        self._tensors = header.tensors
        self._types = {type_id: self._type(type_id) for type_id in {entry.type_id for entry in header.tensors.values()}}
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        self.hf_config: dict[str, Any] = hf_config_from_gguf(header.metadata, shapes, str(self.path))
        self.config = ModelConfig.from_hf(self.hf_config, str(self.path))
        self._check_tensors(header.file_size)
        self.hf_config["torch_dtype"] = self.stored_dtype(weight_table(self.config)[0]).name

    def read(self, weight: Weight) -> np.ndarray:
        """One tensor in our layout; quantised types as float32. Peak memory is below three times the result."""
        entry = self._tensors[gguf_name(weight.hf_name)]
        array = self._decode(self._stored_rows(entry), self._types[entry.type_id]).reshape(entry.shape)
        order = self._row_order(weight)
        if order is not None:
            array = array[order]
        return array.T if weight.transpose else array

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """The dtype that ``read`` returns, without reading."""
        entry = self._tensors[gguf_name(weight.hf_name)]
        return self._types[entry.type_id].float_dtype or np.dtype(np.float32)

    def stored_type(self, weight: Weight) -> str:
        """The ggml type in the file, e.g. ``Q4_1``."""
        return self._types[self._tensors[gguf_name(weight.hf_name)].type_id].quant.name

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with its chat template, built from the metadata."""
        return build_tokenizer(self.metadata, str(self.path))

    def copy_companions(self, target: Path) -> None:
        """Write config.json, generation_config.json, tokenizer files and chat template into ``target``."""
        companions.write_json(target / "config.json", self.hf_config)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: self.hf_config[name] for name in names if name in self.hf_config}
        companions.write_json(target / "generation_config.json", ids)
        if has_tokenizer(self.metadata):
            save_tokenizer(self.tokenizer(), target)

    def _type(self, type_id: int) -> _TensorType:
        gguf = self._library
        try:
            quant = gguf.GGMLQuantizationType(type_id)
            elements, size = gguf.GGML_QUANT_SIZES[quant]
        except (ValueError, KeyError):
            raise UserError(f"{self.path}: truncated or corrupt GGUF file: unknown tensor type {type_id}") from None
        if quant.name not in FLOAT_TYPES:
            try:
                gguf.quants.dequantize(np.zeros((1, size), np.uint8), quant)
            except NotImplementedError:
                raise UserError(f"{self.path}: tensors of type {quant.name} are not supported") from None
        return _TensorType(quant, FLOAT_TYPES.get(quant.name), elements, size)

    def _check_tensors(self, file_size: int) -> None:
        """Compare the file with the weight table: names, shapes, and that every tensor lies inside the file."""
        wanted = {gguf_name(weight.hf_name): weight.hf_shape for weight in weight_table(self.config)}
        missing = [name for name in wanted if name not in self._tensors]
        extra = [name for name in self._tensors if name not in wanted]
        if missing:
            raise UserError(f"{self.path}: missing tensors: {_listed(missing)}{did_you_mean(missing[0], extra)}")
        if extra:
            raise UserError(
                f"{self.path}: tensors that a {self.config.family} model does not have: {_listed(extra)}"
                + did_you_mean(extra[0], wanted)
            )
        for name, entry in self._tensors.items():
            if entry.shape != wanted[name]:
                raise UserError(f"{self.path}: tensor '{name}' has shape {entry.shape}, expected {wanted[name]}")
            kind = self._types[entry.type_id]
            if entry.shape[-1] % kind.elements_per_block:
                raise UserError(f"{self.path}: tensor '{name}': rows of {entry.shape[-1]} cannot be {kind.quant.name}")
            end = entry.offset + self._row_bytes(entry) * math.prod(entry.shape[:-1])
            if end > file_size:
                raise UserError(
                    f"{self.path}: truncated GGUF file: tensor '{name}' ends at byte {end}, the file at {file_size}"
                )

    def _row_bytes(self, entry: TensorEntry) -> int:
        kind = self._types[entry.type_id]
        return entry.shape[-1] // kind.elements_per_block * kind.bytes_per_block

    def _stored_rows(self, entry: TensorEntry) -> np.ndarray:
        """The stored bytes, one row a row; read, not mapped, so that they leave memory with the array."""
        rows, size = math.prod(entry.shape[:-1]), self._row_bytes(entry)
        try:
            data = np.fromfile(self.path, np.uint8, rows * size, offset=entry.offset)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        if data.size != rows * size:
            raise UserError(f"{self.path}: truncated GGUF file: tensor '{entry.name}' is cut short")
        return data.reshape(rows, size)

    def _decode(self, stored: np.ndarray, kind: _TensorType) -> np.ndarray:
        if kind.float_dtype is not None:
            return stored.view(kind.float_dtype)
        rows, columns = len(stored), stored.shape[1] // kind.bytes_per_block * kind.elements_per_block
        out = np.empty((rows, columns), np.float32)
        step = max(1, CHUNK_BYTES // out.itemsize // columns)
        for start in range(0, rows, step):
            out[start : start + step] = self._library.quants.dequantize(stored[start : start + step], kind.quant)
        return out

    def _row_order(self, weight: Weight) -> np.ndarray | None:
        """Where the rows of a permuted tensor lie in the file: pairs (2i, 2i + 1) come back to the halves."""
        if self.config.family != "llama":
            return None
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(weight.hf_name.split(".")[-2])
        if count is None:
            return None
        pairs = np.arange(count * self.config.head_dim).reshape(count, self.config.head_dim // 2, 2)
        return pairs.swapaxes(1, 2).reshape(-1)


def gguf_name(hf_name: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` to ``blk.0.ffn_up.weight``."""
    module, suffix = hf_name.rsplit(".", 1)
    if module in MODULE_NAMES:
        return f"{MODULE_NAMES[module]}.{suffix}"
    layer, inner = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_MODULE_NAMES[inner]}.{suffix}"


def import_gguf() -> types.ModuleType:
    """The ``gguf`` library; raises UserError naming the extra that installs it."""
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError("reading GGUF files needs the gguf library: pip install 'idlm-jax[gguf]'") from None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
