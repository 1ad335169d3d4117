"""Introspective Diffusion Language Models in JAX and Flax: exact strided decoding of autoregressive models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.decoding.generate import SamplingParams
    from idlm_jax.errors import UserError
    from idlm_jax.model import Generation, LanguageModel, load

__all__ = ["DecodeConfig", "Generation", "LanguageModel", "SamplingParams", "UserError", "load"]

_HOME = {
    "DecodeConfig": "idlm_jax.decoding.config",
    "SamplingParams": "idlm_jax.decoding.generate",
    "UserError": "idlm_jax.errors",
    "Generation": "idlm_jax.model",
    "LanguageModel": "idlm_jax.model",
    "load": "idlm_jax.model",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``idlm --help`` need not load JAX."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'idlm_jax' has no attribute '{name}'")
