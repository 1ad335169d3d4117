"""Decode settings from YAML (``configs/decode``), official I-DLM keys included (method.md 3.4).

Keys of the official files keep their meaning where decoding stays exact; a value that would make it lossy is refused by
name. ``layout`` and ``coupling`` are ours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm_jax.config import load_yaml
from idlm_jax.decoding.sampling import COUPLINGS
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.errors import UserError, did_you_mean, require_known_keys

MAX_STRIDE = 16


@dataclass(frozen=True)
class DecodeConfig:
    """A decoding policy by name, and the sampling defaults that a file may carry."""

    # N, the most tokens a forward pass can emit (official: gen_block_size); 1 is AR.
    stride: int = 4
    # "branch" or "standard".
    layout: str = "branch"
    # "gumbel" or "ratio".
    coupling: str = "gumbel"
    # Adapter on mask rows only, lossless (official: conditional_lora).
    gated: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def policy(self) -> Policy:
        """The policy these names stand for; raises UserError for a name or stride that does not exist."""
        if not 1 <= self.stride <= MAX_STRIDE:
            raise UserError(f"stride must be in 1 … {MAX_STRIDE}, not {self.stride}")
        return Policy(
            stride=self.stride,
            layout=_named("layout", self.layout, LAYOUTS),
            coupling=_named("coupling", self.coupling, COUPLINGS),
            gated=self.gated,
        )


# Official keys whose other values are lossy or mean nothing in an exact decoder, with the one value that is accepted.
_EXACT_ONLY: dict[str, Any] = {
    "confidence_threshold": 0.0,
    "use_spec_verify": True,
    "verify_alpha": 1.0,
    "fast_verify": False,
    "output_correction": False,
    "causal_prefill": True,
}
# Official keys that only tune a lossy mode.
_LOSSY = ("fast_verify_topk", "fast_verify_topk_per_spec", "confidence_accept_threshold")
_OFFICIAL_NAMES = {"gen_block_size": "stride", "conditional_lora": "gated"}


def load_decode_config(path: Path) -> DecodeConfig:
    """Read a YAML file of decode settings; raises UserError for unknown keys and for lossy settings."""
    data = load_yaml(path)
    ours = DecodeConfig.__dataclass_fields__
    known = [*ours, *_OFFICIAL_NAMES, *_EXACT_ONLY, *_LOSSY, "block_size", "verify_num_specs"]
    require_known_keys(data, known, str(path))
    for key in _LOSSY:
        if key in data:
            raise UserError(
                f"{path}: '{key}' belongs to a lossy verification that this decoder does not have; remove it"
            )
    for key, exact in _EXACT_ONLY.items():
        if data.get(key, exact) != exact:
            raise UserError(
                f"{path}: '{key}: {data[key]}' would change the distribution of the text; only {exact} is exact"
            )
    values = {_OFFICIAL_NAMES.get(key, key): value for key, value in data.items()}
    settings = {key: value for key, value in values.items() if key in ours}
    for key, value in settings.items():
        expected = type(getattr(DecodeConfig(), key))
        if not isinstance(value, expected | (int if expected is float else expected)) or (
            isinstance(value, bool) and expected is not bool
        ):
            raise UserError(f"{path}: '{key}' must be of type {expected.__name__}, not {value!r}")
    config = DecodeConfig(**settings)
    config.policy()
    _check_sizes(data, config.stride, path)
    return config


def _check_sizes(data: dict[str, Any], stride: int, path: Path) -> None:
    for key, needed in (("block_size", 2 * stride - 1), ("verify_num_specs", stride - 1)):
        if data.get(key, needed) != needed:
            raise UserError(f"{path}: '{key}' must be {needed} at stride {stride}, not {data[key]}")


def _named(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"unknown {what} '{name}' (one of {', '.join(table)}){did_you_mean(name, table)}")
    return table[name]
