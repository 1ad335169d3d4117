"""Where weights come from: one small interface over Hugging Face directories, GGUF files and our Orbax checkpoints.

Loading, conversion, export and ``idlm info`` read tensors one at a time through it, so none of them needs memory for a
whole checkpoint.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from idlm_jax.backbone.weights import Weight
from idlm_jax.config import ModelConfig

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
