"""Where weights come from: one small interface over Hugging Face directories, GGUF files and our Orbax checkpoints.

Loading, conversion, export and ``idlm info`` read tensors one at a time through it, so none of them needs memory for a
whole checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from idlm_jax.backbone.weights import Weight, weight_table
from idlm_jax.checkpoint.arrays import Index
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class WeightSource(Protocol):
    """An opened checkpoint; opening has already checked names, shapes and dtypes against the weight table."""

    path: Path
    # "huggingface", "gguf" or "orbax"
    kind: str
    config: ModelConfig
    # The Hugging Face config.json of the model, as it was or, for GGUF, as it would be.
    hf_config: dict[str, Any]

    def read(self, weight: Weight) -> np.ndarray:
        """One tensor in our layout and in its stored dtype (GGUF: de-quantised to float32)."""
        ...

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """The dtype that ``read`` returns, without reading."""
        ...

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer with its chat template; raises UserError when the checkpoint has none."""
        ...

    def copy_companions(self, target: Path) -> None:
        """Write config.json, generation_config.json, tokenizer files and chat template into ``target``."""
        ...


@dataclass
class Configuration:
    """A source that has shapes alone, for programs that are compiled and not run."""

    path: Path
    config: ModelConfig
    kind: str = "configuration"
    hf_config: dict[str, Any] = field(default_factory=dict)

    def read(self, weight: Weight) -> np.ndarray:
        """There is nothing to read."""
        raise UserError(f"{self.path} describes a model; it has no weights")

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """There is nothing stored."""
        return self.read(weight).dtype

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """There is none."""
        raise UserError(f"{self.path} describes a model; it has no tokenizer")

    def copy_companions(self, target: Path) -> None:
        """There are none."""


def read_each(source: WeightSource, weights: Iterable[Weight]) -> Iterator[np.ndarray]:
    """Tensors in the order asked for; sources that read several small ones at once faster may do so."""
    batched = getattr(source, "read_each", None)
    return map(source.read, weights) if batched is None else batched(weights)


def read_parts(source: WeightSource, weights: Iterable[Weight]) -> Iterator[Callable[[Index], np.ndarray]]:
    """What reads a part of each tensor, in the order asked for; only some sources need not read the whole for it."""
    part = getattr(source, "read_part", None)
    if part is not None:
        return (partial(part, weight) for weight in weights)
    return (array.__getitem__ for array in read_each(source, weights))


def target_dtype(source: WeightSource, weight: Weight, dtype: np.dtype | None) -> np.dtype:
    """The dtype of a tensor after a conversion to ``dtype``; None keeps each tensor's own."""
    return source.stored_dtype(weight) if dtype is None else np.dtype(dtype)


def parse_dtype(name: str) -> np.dtype | None:
    """The dtype of a command line: "keep" (None), "bfloat16", "float16" or "float32"."""
    if name == "keep":
        return None
    known = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    if name not in known:
        raise UserError(f"unknown dtype '{name}' (keep, {', '.join(known)}){did_you_mean(name, known)}")
    return np.dtype(known[name])


def stored_size(source: WeightSource, dtype: np.dtype | None = None) -> int:
    """Bytes of all tensors, after a conversion to ``dtype``."""
    return sum(weight.size * target_dtype(source, weight, dtype).itemsize for weight in weight_table(source.config))


def changed_config(
    source: WeightSource, dtype: np.dtype | None = None, mask_token_id: int | None = None
) -> dict[str, Any] | None:
    """The config.json after a conversion, or None where the original stands as it is."""
    changed = dict(source.hf_config)
    if dtype is not None:
        # transformers 5 writes "dtype", older ones "torch_dtype"; both read either.
        for key in [key for key in ("dtype", "torch_dtype") if key in changed] or ["dtype"]:
            changed[key] = np.dtype(dtype).name
    if mask_token_id is not None:
        changed["mask_token_id"] = mask_token_id
    return None if changed == source.hf_config else changed


def find_mask_token(source: WeightSource, token: str) -> int:
    """The id of a mask token given as an id or as the text of exactly one token; raises UserError for anything else."""
    size = source.config.vocab_size
    if token.lstrip("-").isdigit():
        token_id = int(token)
    else:
        tokenizer = source.tokenizer()
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"mask token {token!r} is {len(ids)} tokens of this tokenizer; it must be exactly one")
        token_id = ids[0]
    if not 0 <= token_id < size:
        raise UserError(f"mask token id {token_id} is outside the vocabulary (0 … {size - 1})")
    return token_id
