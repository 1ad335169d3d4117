"""Hugging Face directories: one safetensors file or shards with an index, read and written a tensor at a time."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from idlm_jax.backbone.weights import Weight, parameter_count, weight_table
from idlm_jax.checkpoint import companions, safetensors
from idlm_jax.checkpoint.atomic import new_directory
from idlm_jax.checkpoint.safetensors import StoredTensor
from idlm_jax.checkpoint.source import WeightSource, changed_config, read_each, stored_size, target_dtype
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_KINDS = {"huggingface": "a Hugging Face directory", "orbax": "an Orbax checkpoint", "gguf": "a GGUF file"}
# Names listed in a message before "…".
_NAMES_SHOWN = 3
# Buffers that old checkpoints carry and every reader ignores.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A causal language model of the `{family}` family with {parameters} parameters ({dtypes}), written by
`idlm_jax` from {kind}. The licence is that of the model it was made from.

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With idlm_jax, several tokens a forward pass:

```
idlm generate {name} --prompt "Why is the sky blue?"
```
"""


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

    def read_part(self, weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
        """``read(weight)[index]``, without reading the rest."""
        tensor = self._tensors[weight.hf_name]
        return tensor.read_part(index[::-1]).T if weight.transpose else tensor.read_part(index)

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """The dtype that ``read`` returns, without reading."""
        return safetensors.DTYPES[self._tensors[weight.hf_name].dtype_name]

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with its chat template."""
        return companions.load_tokenizer(self.path)

    def copy_companions(self, target: Path) -> None:
        """Copy configuration, tokenizer and licence files."""
        companions.copy_companions(self.path, target)


def write_hf(
    source: WeightSource,
    target: str | Path,
    dtype: np.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write any source as a Hugging Face directory that transformers loads; ``progress`` hears of the bytes written."""
    weights = {weight.hf_name: weight for weight in weight_table(source.config)}
    layout = {name: (target_dtype(source, weight, dtype), weight.hf_shape) for name, weight in weights.items()}

    split = plan_shards(layout, max_shard_size)
    target = Path(target)
    with new_directory(target, stored_size(source, dtype), overwrite, source.path) as directory:
        for file, names in split.filename_to_tensors.items():
            part = {name: layout[name] for name in names}
            arrays = read_each(source, [weights[name] for name in safetensors.file_order(part)])

            def read(name: str, arrays: Iterator[np.ndarray] = arrays) -> np.ndarray:
                array = next(arrays).astype(layout[name][0], copy=False)
                return array.T if weights[name].transpose else array

            for size in safetensors.write_file(directory / file, part, read):
                progress(size)
        if split.is_sharded:
            companions.write_json(
                directory / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            )
        source.copy_companions(directory)
        config = changed_config(source, dtype)
        if config is not None:
            companions.write_json(directory / "config.json", config)
        card = _CARD.format(
            name=target.name,
            family=source.config.family,
            parameters=f"{parameter_count(source.config):,}",
            kind=_KINDS[source.kind],
            dtypes=", ".join(sorted({dtype.name for dtype, _ in layout.values()})),
        )
        (directory / "README.md").write_text(card, encoding="utf-8")


def plan_shards(layout: safetensors.Layout, max_shard_size: int | str) -> StateDictSplit:
    """Which tensor goes to which file; raises UserError for a size like '5 parsecs'."""
    try:
        return split_state_dict_into_shards_factory(
            layout,
            get_storage_size=lambda entry: math.prod(entry[1]) * entry[0].itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise UserError(f"shard size {max_shard_size!r} is not a size; write for example 5GB or 500MB") from None


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
