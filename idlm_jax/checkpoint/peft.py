"""PEFT LoRA directories in and out (method.md 2.6, 4).

PEFT stores ``lora_A`` as [R, in] and ``lora_B`` as [out, R]; ours are their transposes. A trained mask embedding and
the id of the mask token ride along in two small files of our own, so the directory stays one that PEFT loads. What an
adapter_config.json asks for and this backbone does not compute is refused by name.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from idlm_jax.backbone.adapter import TARGET_MODULES, Adapter, AdapterConfig
from idlm_jax.backbone.weights import is_stacked, unstack_layers
from idlm_jax.checkpoint import safetensors
from idlm_jax.checkpoint.atomic import new_directory
from idlm_jax.checkpoint.companions import read_json, write_json
from idlm_jax.checkpoint.open import download_from_hub
from idlm_jax.checkpoint.safetensors import StoredTensor
from idlm_jax.checkpoint.shipped import shipped_directory
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError, did_you_mean, require_known_keys

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What PEFT has no place for.
MASK_CONFIG_FILE, MASK_FILE, MASK_TENSOR = "idlm_adapter.json", "mask_embedding.safetensors", "mask_embedding"
FORMAT = 1
# Keys whose value does not change what a trained LoRA computes, or that are read here. Any other key must be off.
READ_OR_HARMLESS = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("lora_dropout", "megatron_core", "ensure_weight_tying", "layers_pattern", "qalora_group_size", "runtime_config"),
    *("eva_config", "lora_ga_config", "loftq_config", "corda_config"),  # initialisation; see BASE_KEEPING
}
OFF = (None, False, "none", "", 0, [], {})
# Initialisations that leave the base weights as they are; the others (pissa, olora, corda, loftq …) change them.
BASE_KEEPING = (None, True, False, "gaussian", "eva", "orthogonal")
NAMES_SHOWN = 3
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")


def load_adapter(adapter: str | Path, config: ModelConfig) -> Adapter:
    """Read a PEFT LoRA for a model; matrices keep their stored dtype.

    ``adapter`` is a directory, the name of an adapter that comes with the package (``shipped.SHIPPED``), or a Hub id.
    Raises UserError for an adapter that is damaged, incomplete, of an unsupported kind, or made for another model.
    """
    path = Path(adapter).expanduser()
    if not path.exists():
        path = shipped_directory(str(adapter)) or download_from_hub(str(adapter), path)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: no {CONFIG_FILE}; give the directory of a PEFT adapter")
    if not (path / WEIGHTS_FILE).is_file() and (path / "adapter_model.bin").is_file():
        raise UserError(f"{path}: holds adapter_model.bin; load and save it once with PEFT to get {WEIGHTS_FILE}")
    settings = read_json(path / CONFIG_FILE)
    where = str(path / CONFIG_FILE)
    _check_settings(settings, where)
    tensors = safetensors.read_header(path / WEIGHTS_FILE)
    layers = _count_layers(tensors, path / WEIGHTS_FILE)
    adapter_config = AdapterConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        target_modules=_targets(settings, layers, where),
        use_rslora=bool(settings.get("use_rslora")),
        mask_token_id=_mask_token_id(path, config),
        base_model=settings.get("base_model_name_or_path"),
    )
    adapter_config.validate(where)
    params: dict[str, Any] = {"layers": _read_layers(tensors, adapter_config, layers, path / WEIGHTS_FILE)}
    mask_embedding = _mask_embedding(path)
    if mask_embedding is not None:
        params["mask_embedding"] = mask_embedding
    loaded = Adapter(adapter_config, params)
    loaded.check_fits(config, str(path))
    return loaded


def save_adapter(adapter: Adapter, target: Path, base_model: str | None = None, overwrite: bool = False) -> None:
    """Write a directory that PEFT loads, whole or not at all; matrices keep their dtype, layers may be stacked.

    ``base_model`` (Hub id or path; default: the one in the adapter's config) is only a note for whoever loads it.
    Raises UserError when ``target`` exists, unless ``overwrite``, or the disk is full.
    """
    params = unstack_layers(adapter.params) if is_stacked(adapter.params) else adapter.params
    matrices: dict[str, np.ndarray] = {}
    for layer, modules in enumerate(params["layers"]):
        for module, projections in modules.items():
            for name, pair in projections.items():
                for side in ("a", "b"):
                    matrices[_tensor_name(layer, module, name, side)] = np.asarray(pair[side]).T
    mask_embedding = params.get("mask_embedding")
    with new_directory(Path(target), sum(array.nbytes for array in matrices.values()), overwrite) as folder:
        write_json(folder / CONFIG_FILE, _peft_settings(adapter.config, base_model))
        _write_tensors(folder / WEIGHTS_FILE, matrices)
        if mask_embedding is not None:
            _write_tensors(folder / MASK_FILE, {MASK_TENSOR: np.asarray(mask_embedding)})
        if mask_embedding is not None or adapter.config.mask_token_id is not None:
            write_json(folder / MASK_CONFIG_FILE, {"format": FORMAT, "mask_token_id": adapter.config.mask_token_id})


def _tensor_name(layer: int, module: str, projection: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.{projection}.lora_{side.upper()}.weight"


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise UserError for any setting that would change the arithmetic, and for a missing or senseless one."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {settings.get('peft_type')!r} is not supported (supported: 'LORA')")
    for key, value in settings.items():
        if key not in READ_OR_HARMLESS and value not in OFF:
            raise UserError(f"{where}: '{key}' = {_short(value)} is not supported")
    if settings.get("init_lora_weights") not in BASE_KEEPING:
        raise UserError(
            f"{where}: 'init_lora_weights' = {settings['init_lora_weights']!r} changes the base weights and is not "
            "supported; convert the adapter to an ordinary LoRA with PEFT first"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{where}: 'r' must be a positive integer, not {_short(rank)}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise UserError(f"{where}: 'lora_alpha' must be a number, not {_short(alpha)}")


def _targets(settings: Mapping[str, Any], layers: int, where: str) -> tuple[str, ...]:
    """The projections that target_modules (a list, a regular expression, or 'all-linear') selects, as PEFT matches."""
    wanted = settings.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = list(TARGET_MODULES)
    if not wanted or not isinstance(wanted, str | list):
        raise UserError(f"{where}: 'target_modules' must be a list of names or a regular expression")
    excluded = settings.get("exclude_modules") or []
    try:
        for outside in ("lm_head", "model.embed_tokens"):
            if _matches(outside, wanted) and not _matches(outside, excluded):
                raise UserError(f"{where}: 'target_modules' selects {outside}, which is not supported")
        chosen = [
            {
                name
                for name, module in TARGET_MODULES.items()
                if _matches(f"model.layers.{layer}.{module}.{name}", wanted)
                and not _matches(f"model.layers.{layer}.{module}.{name}", excluded)
            }
            for layer in range(layers)
        ]
    except re.error as error:
        raise UserError(f"{where}: 'target_modules' is not a regular expression: {error}") from None
    if not chosen[0]:
        hint = "" if isinstance(wanted, str) else did_you_mean(str(wanted[0]), TARGET_MODULES)
        raise UserError(f"{where}: 'target_modules' {_short(wanted)} selects nothing of this model{hint}")
    for layer, names in enumerate(chosen):
        if names != chosen[0]:
            raise UserError(
                f"{where}: 'target_modules' selects {', '.join(sorted(chosen[0] ^ names))} in only one of layers 0 and "
                f"{layer}; an adapter must touch the same projections in every layer"
            )
    return tuple(name for name in TARGET_MODULES if name in chosen[0])


def _matches(module: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _count_layers(tensors: Mapping[str, StoredTensor], where: Path) -> int:
    """Number of layers that the file has matrices for; raises UserError naming every other tensor."""
    matches = {name: _TENSOR.fullmatch(name) for name in tensors}
    strange = [name for name, match in matches.items() if match is None]
    if strange:
        raise UserError(f"{where}: unexpected {_listed(strange)}")
    if not matches:
        raise UserError(f"{where}: holds no tensors")
    return 1 + max(int(match[1]) for match in matches.values() if match)


def _read_layers(
    tensors: Mapping[str, StoredTensor], config: AdapterConfig, layers: int, where: Path
) -> list[dict[str, Any]]:
    """Every matrix in our layout; raises UserError for missing or extra ones and for another rank or dtype."""
    names = {
        (layer, name, side): _tensor_name(layer, TARGET_MODULES[name], name, side)
        for layer in range(layers)
        for name in config.target_modules
        for side in ("a", "b")
    }
    missing = [name for name in names.values() if name not in tensors]
    extra = sorted(set(tensors) - set(names.values()))
    if missing:
        raise UserError(f"{where}: missing {_listed(missing)}")
    if extra:
        raise UserError(f"{where}: {_listed(extra)} of projections that 'target_modules' does not select")
    tree: list[dict[str, Any]] = [{} for _ in range(layers)]
    for (layer, name, side), tensor_name in names.items():
        tensor = tensors[tensor_name]
        if tensor.dtype_name not in safetensors.DTYPES:
            raise UserError(f"{where}: {tensor_name} has dtype {tensor.dtype_name}, which is not supported")
        if len(tensor.shape) != 2 or tensor.shape[0 if side == "a" else 1] != config.rank:
            raise UserError(
                f"{where}: {tensor_name} has shape {list(tensor.shape)}, but {CONFIG_FILE} says rank {config.rank}"
            )
        tree[layer].setdefault(TARGET_MODULES[name], {}).setdefault(name, {})[side] = tensor.read().T
    return tree


def _mask_token_id(path: Path, config: ModelConfig) -> int | None:
    if not (path / MASK_CONFIG_FILE).is_file():
        return None
    where, settings = str(path / MASK_CONFIG_FILE), read_json(path / MASK_CONFIG_FILE)
    require_known_keys(settings, ("format", "mask_token_id"), where)
    if settings.get("format") != FORMAT:
        raise UserError(f"{where}: format {settings.get('format')!r} is not known (known: {FORMAT})")
    token_id = settings.get("mask_token_id")
    if token_id is not None and (not isinstance(token_id, int) or not 0 <= token_id < config.vocab_size):
        raise UserError(f"{where}: mask_token_id {_short(token_id)} is outside the vocabulary of {config.vocab_size}")
    return token_id


def _mask_embedding(path: Path) -> np.ndarray | None:
    if not (path / MASK_FILE).is_file():
        return None
    tensors = safetensors.read_header(path / MASK_FILE)
    if list(tensors) != [MASK_TENSOR] or tensors[MASK_TENSOR].dtype_name not in safetensors.DTYPES:
        raise UserError(f"{path / MASK_FILE}: must hold one floating-point tensor named '{MASK_TENSOR}'")
    return tensors[MASK_TENSOR].read()


def _peft_settings(config: AdapterConfig, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json with the keys that every PEFT since 0.4 reads."""
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return {
        "base_model_name_or_path": base_model if base_model is not None else config.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": sorted(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.use_rslora,
    }


def _write_tensors(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    for _ in safetensors.write_file(file, layout, lambda name: arrays[name]):
        pass


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
