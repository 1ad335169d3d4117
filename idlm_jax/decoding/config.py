"""Decode settings from YAML (``configs/decode``), official I-DLM keys included (method.md 3.4).

Keys of the official files keep their meaning where decoding stays exact; a value that would make it lossy is refused by
name. ``layout`` and ``coupling`` are ours.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm_jax.config import load_yaml
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.sampling import COUPLINGS
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.errors import UserError, did_you_mean, require_known_keys
from pallas_kernels import KERNELS

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
    # "auto": what is fastest here; "xla": no kernels.
    kernels: str = "auto"

    def policy(self) -> Policy:
        """The policy these names stand for; raises UserError for a name or stride that does not exist."""
        if not 1 <= self.stride <= MAX_STRIDE:
            raise UserError(f"stride must be in 1 … {MAX_STRIDE}, not {self.stride}")
        return Policy(
            stride=self.stride,
            layout=_named("layout", self.layout, LAYOUTS),
            coupling=_named("coupling", self.coupling, COUPLINGS),
            gated=self.gated,
            kernels=_named("kernels", self.kernels, {name: name for name in KERNELS}),
        )


# Official keys of which one value alone is exact, and what any other would do.
_EXACT_ONLY: dict[str, tuple[Any, str]] = {
    "confidence_threshold": (0.0, "let drafts through by their confidence"),
    "use_spec_verify": (True, "accept drafts without verifying them"),
    "verify_alpha": (1.0, "accept drafts with another probability than min(1, p/q)"),
    "fast_verify": (False, "accept any draft among the top logits"),
    "output_correction": (False, "emit another token than the one the model goes on from"),
    "causal_prefill": (True, "let prompt tokens see those after them"),
}
# Official keys that only tune a lossy mode.
_LOSSY = ("fast_verify_topk", "fast_verify_topk_per_spec", "confidence_accept_threshold")
_OFFICIAL_NAMES = {"gen_block_size": "stride", "conditional_lora": "gated"}


def load_decode_config(path: str | Path) -> DecodeConfig:
    """Read a YAML file of decode settings; raises UserError for unknown keys, bad values and lossy settings."""
    data = {str(key): value for key, value in load_yaml(Path(path)).items()}
    ours = DecodeConfig.__dataclass_fields__
    known = [*ours, *_OFFICIAL_NAMES, *_EXACT_ONLY, *_LOSSY, "block_size", "verify_num_specs"]
    require_known_keys(data, known, str(path))
    _refuse_lossy(data, path)
    settings: dict[str, Any] = {}
    for key, value in data.items():
        name = _OFFICIAL_NAMES.get(key, key)
        if name not in ours:
            continue
        if name in settings:
            official = next(theirs for theirs, own in _OFFICIAL_NAMES.items() if own == name)
            raise UserError(f"{path}: '{official}' and '{name}' mean the same; give one of them")
        settings[name] = _checked(key, value, type(getattr(DecodeConfig(), name)), path)
    config = DecodeConfig(**settings)
    try:
        config.policy()
        SamplingParams(config.temperature, config.top_k, config.top_p).validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    _check_sizes(data, config.stride, path)
    return config


def _refuse_lossy(data: dict[str, Any], path: str | Path) -> None:
    for key in _LOSSY:
        if key in data:
            raise UserError(f"{path}: '{key}' tunes a lossy verification that this decoder does not have; remove it")
    for key, (exact, effect) in _EXACT_ONLY.items():
        if data.get(key, exact) != exact:
            raise UserError(
                f"{path}: '{key}: {_as_yaml(data[key])}' would {effect}, which changes the distribution of the text; "
                f"only {_as_yaml(exact)} is exact"
            )


def _checked(key: str, value: Any, expected: type, path: str | Path) -> Any:
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{path}: '{key}' must be of type {expected.__name__}, not {_as_yaml(value)}")
    return expected(value)


def _check_sizes(data: dict[str, Any], stride: int, path: str | Path) -> None:
    if data.get("block_size", 2 * stride - 1) != 2 * stride - 1:
        raise UserError(
            f"{path}: 'block_size' must be {2 * stride - 1} at stride {stride}, not {_as_yaml(data['block_size'])}"
        )
    if data.get("verify_num_specs", stride - 1) != stride - 1:
        raise UserError(
            f"{path}: 'verify_num_specs: {_as_yaml(data['verify_num_specs'])}' would accept the drafts after those "
            f"without verifying them, which changes the distribution of the text; only {stride - 1} is exact at "
            f"stride {stride}"
        )


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | str | None) else str(value)


def _named(what: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise UserError(f"unknown {what} '{name}' (one of {', '.join(table)}){did_you_mean(name, table)}")
    return table[name]
