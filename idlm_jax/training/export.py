"""Trained weights as a checkpoint of ours: the base's configuration and tokenizer with the new tensors."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from idlm_jax.backbone.weights import Weight, weight_table
from idlm_jax.checkpoint.source import WeightSource
from idlm_jax.checkpoint.store import write_orbax
from idlm_jax.config import ModelConfig
from idlm_jax.training.params import Flat


class TrainedSource:
    """A WeightSource over the flat, stacked weights of a run; everything but the tensors is the base model's."""

    kind = "trained"

    def __init__(self, base: WeightSource, config: ModelConfig, params: Flat):
        self.path = base.path
        self.config = config
        self.hf_config: dict[str, Any] = base.hf_config
        self._base, self._params = base, params

    def read(self, weight: Weight) -> np.ndarray:
        """One tensor, gathered from all devices."""
        parts = weight.path.split(".")
        array = self._array(weight)
        local = array[int(parts[1])] if parts[0] == "layers" else array
        if jax.process_count() > 1:
            local = multihost_utils.process_allgather(local, tiled=True)
        return np.asarray(local)

    def stored_dtype(self, weight: Weight) -> np.dtype:
        """Float32 for what was trained, else the dtype of computation."""
        return np.dtype(self._array(weight).dtype)

    def tokenizer(self) -> Any:
        """The base model's."""
        return self._base.tokenizer()

    def copy_companions(self, target: Path) -> None:
        """The base model's."""
        self._base.copy_companions(target)

    def _array(self, weight: Weight) -> jax.Array:
        parts = weight.path.split(".")
        return self._params[".".join([parts[0], *parts[2:]]) if parts[0] == "layers" else weight.path]


def save_model(base: WeightSource, config: ModelConfig, params: Flat, target: Path) -> None:
    """Write a checkpoint that every verb takes, in the dtype the base was stored in; replaces an older one."""
    dtype = base.stored_dtype(weight_table(config)[0])
    write_orbax(TrainedSource(base, config, params), target, dtype, config.mask_token_id, overwrite=True)
