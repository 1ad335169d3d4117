"""What a model is: a frozen ModelConfig, read from any Hugging Face config.json of the supported families.

Families: ``qwen3``, ``sdar`` (I-DLM's name for the same tensors), ``qwen2`` (biases on q/k/v, no qk-norm) and ``llama``
(neither). Both spellings of the rotary settings are read: ``rope_theta`` and ``rope_scaling`` at the top level
(transformers 4) and ``rope_parameters`` (transformers 5).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from idlm_jax.errors import UserError, did_you_mean

FAMILIES = ("qwen3", "sdar", "qwen2", "llama")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")

# The unused row of Qwen3's padded embedding that I-DLM trains as <|MASK|> (method.md 1.3).
QWEN3_MASK_TOKEN_ID = 151_669


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as transformers defines it (``modeling_rope_utils``)."""

    theta: float = 10_000.0
    # One of ROPE_KINDS; everything below is read only by the kinds named beside it.
    kind: str = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin; derived from factor and mscale when None
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of one decoder-only model; field names follow Hugging Face."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    # Never derived from hidden_size / num_attention_heads where the checkpoint says otherwise (method.md 1.1).
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    max_position_embeddings: int
    # RMSNorm over head_dim on q and k, before RoPE (qwen3, sdar).
    qk_norm: bool
    # Bias of q, k and v; bias of o.
    attention_bias: bool
    attention_output_bias: bool
    initializer_range: float = 0.02
    # The token whose rows draft (method.md 1.3); None when the checkpoint does not name one.
    mask_token_id: int | None = None
    # Any of these ends a text.
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face config; raises UserError, naming the key, for anything this backbone does not compute."""
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"{where}: model_type '{family}' is not supported (supported: {', '.join(FAMILIES)})"
                + did_you_mean(str(family), FAMILIES)
            )
        _refuse_unsupported(hf, where)
        heads = _positive(hf, "num_attention_heads", where)
        hidden = _positive(hf, "hidden_size", where)
        qwen3 = family in ("qwen3", "sdar")
        vocab_size = _positive(hf, "vocab_size", where)
        mask_token_id = hf.get("mask_token_id")
        if mask_token_id is None and qwen3 and vocab_size > QWEN3_MASK_TOKEN_ID:
            mask_token_id = QWEN3_MASK_TOKEN_ID
        config = cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=_positive(hf, "intermediate_size", where),
            num_hidden_layers=_positive(hf, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=int(hf.get("num_key_value_heads") or heads),
            # transformers' own defaults where the key is absent
            head_dim=int(hf.get("head_dim") or (128 if qwen3 else hidden // heads)),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=_rope_from_hf(hf, where),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position_embeddings=int(hf.get("max_position_embeddings", 2048)),
            qk_norm=qwen3,
            attention_bias=family == "qwen2" or bool(hf.get("attention_bias", False)),
            attention_output_bias=family != "qwen2" and bool(hf.get("attention_bias", False)),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            mask_token_id=mask_token_id,
            eos_token_ids=_token_ids(hf.get("eos_token_id")),
            bos_token_id=hf.get("bos_token_id"),
        )
        config.validate(where)
        return config

    def validate(self, where: str) -> None:
        """Raise UserError when sizes contradict each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{where}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"{where}: head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"{where}: mask_token_id {self.mask_token_id} is outside the vocabulary {self.vocab_size}")

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises UserError for a missing file, bad YAML, or anything but a mapping."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return data


def _positive(hf: Mapping[str, Any], key: str, where: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: '{key}' must be a positive integer, not {value!r}")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _refuse_unsupported(hf: Mapping[str, Any], where: str) -> None:
    """Name every switch of these families that would change the arithmetic and that this backbone does not have."""
    sliding = hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ())
    refused = {
        "hidden_act": hf.get("hidden_act", "silu") not in ("silu", "swish"),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(sliding),
        "quantization_config": hf.get("quantization_config") is not None,
        "partial_rotary_factor": hf.get("partial_rotary_factor") not in (None, 1, 1.0),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{where}: '{key}' = {hf.get(key)!r} is not supported")


def _rope_from_hf(hf: Mapping[str, Any], where: str) -> RopeConfig:
    parameters = dict(hf.get("rope_parameters") or {})
    scaling = dict(hf.get("rope_scaling") or {})
    merged = {**scaling, **parameters}
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    theta = merged.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0
    if kind not in ROPE_KINDS:
        raise UserError(f"{where}: rope type '{kind}' is not supported (supported: {', '.join(ROPE_KINDS)})")
    if merged.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: 'partial_rotary_factor' other than 1 is not supported")
    if kind == "default":
        return RopeConfig(theta=float(theta))
    known = {field.name for field in dataclasses.fields(RopeConfig)} - {"theta", "kind"}
    for key in merged:
        if key not in known:
            raise UserError(f"{where}: unknown rope setting '{key}'{did_you_mean(key, known)}")
    if kind in ("llama3", "yarn") and not merged.get("original_max_position_embeddings"):
        if kind == "llama3":
            raise UserError(f"{where}: rope type 'llama3' needs 'original_max_position_embeddings'")
        merged["original_max_position_embeddings"] = hf.get("max_position_embeddings")
    if not merged.get("factor"):
        raise UserError(f"{where}: rope type '{kind}' needs 'factor'")
    return RopeConfig(
        theta=float(theta), kind=kind, **{key: value for key, value in merged.items() if value is not None}
    )
