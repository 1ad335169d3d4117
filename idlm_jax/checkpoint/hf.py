"""Hugging Face directories: one safetensors file or shards with an index, read and written one tensor at a time."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from idlm_jax.backbone.weights import Weight, weight_table
from idlm_jax.checkpoint import companions, safetensors
from idlm_jax.checkpoint.safetensors import StoredTensor
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Names listed in a message before "…".
_NAMES_SHOWN = 3
# Buffers that old checkpoints carry and every reader ignores.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


class HFSource:
    """A Hugging Face directory, checked against the weight table when opened."""

    kind = "huggingface"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        where = self.path / "config.json"
        self.hf_config: dict[str, Any] = companions.read_json(where)
        self.config = ModelConfig.from_hf(self.hf_config, str(where))
        self._tensors = find_tensors(self.path)
        check_tensors(self.config, self._tensors, self.path)

    def read(self, weight: Weight) -> np.ndarray:
        """One tensor in our layout; a transposed one is a view of what the file holds."""
        array = self._tensors[weight.hf_name].read()
        return array.T if weight.transpose else array

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """The dtype that ``read`` returns, without reading."""
        return safetensors.DTYPES[self._tensors[weight.hf_name].dtype_name]

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with its chat template."""
        return companions.load_tokenizer(self.path)

    def copy_companions(self, target: Path) -> None:
        """Copy configuration, tokenizer and licence files."""
        companions.copy_companions(self.path, target)


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by name; raises UserError when a file, or a tensor of the index, is missing."""
    if (path / SINGLE_FILE).is_file():
        return safetensors.read_header(path / SINGLE_FILE)
    if not (path / INDEX_FILE).is_file():
        raise UserError(f"{path}: no {SINGLE_FILE} and no {INDEX_FILE}{_hint(path)}")
    weight_map = companions.read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX_FILE}: no 'weight_map'; the file may be damaged or incomplete")
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (path / name).is_file()]
    if absent:
        raise UserError(f"{path}: the index names {_some(absent, 'file')} that does not exist; download again")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors |= safetensors.read_header(path / name)
    unfound = sorted(set(weight_map) - set(tensors))
    if unfound:
        raise UserError(f"{path}: no file holds {_some(unfound, 'tensor')} of the index; download again")
    return tensors


def check_tensors(config: ModelConfig, tensors: Mapping[str, StoredTensor], where: Path) -> None:
    """Raise UserError, naming tensors, unless names, shapes and dtypes are those of the weight table."""
    expected = {weight.hf_name: weight for weight in weight_table(config)}
    # Buffers of old checkpoints, and a tied head that is stored all the same.
    ignored = {name for name in tensors if _IGNORED.search(name)}
    if config.tie_word_embeddings:
        ignored.add(HEAD)
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and name not in ignored]
    if missing:
        close = difflib.get_close_matches(missing[0], extra, n=1)
        hint = f"; it has '{close[0]}' instead" if close else ""
        raise UserError(f"{where}: missing {_some(missing, 'tensor')} of {len(expected)}{hint}")
    if extra:
        raise UserError(f"{where}: {_some(extra, 'tensor')} not in a {config.family} model of this config.json")
    for name, weight in expected.items():
        if tensors[name].shape != weight.hf_shape:
            raise UserError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, config.json asks for {list(weight.hf_shape)}"
            )
        if tensors[name].dtype_name not in safetensors.DTYPES:
            raise UserError(
                f"{where}: {name} has dtype {tensors[name].dtype_name}, which is not supported "
                f"(supported: {', '.join(safetensors.DTYPES)})"
            )
    if HEAD in ignored and HEAD in tensors and not tensors[HEAD].equals(tensors[EMBEDDING]):
        raise UserError(
            f"{where}: {HEAD} differs from {EMBEDDING}, but config.json ties them; "
            "set 'tie_word_embeddings' to false to use both"
        )


def _some(names: Iterable[str], what: str) -> str:
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _hint(path: Path) -> str:
    if (path / "adapter_model.safetensors").is_file():
        return "; it holds a PEFT adapter: give it as the adapter of its base model"
    if any(path.glob("pytorch_model*.bin")):
        return "; it holds PyTorch .bin weights: load and save them once with transformers to get safetensors"
    found = sorted(file.name for file in path.glob("*.safetensors"))
    return f"; found {', '.join(found)}" if found else ""
