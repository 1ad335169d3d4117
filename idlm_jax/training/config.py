"""What a training run is: frozen dataclasses, read from a YAML file in ``configs/train`` of what differs."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from idlm_jax.backbone.adapter import TARGET_MODULES
from idlm_jax.backbone.qwen3 import Remat
from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.config import load_yaml
from idlm_jax.decoding.config import MAX_STRIDE
from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.training.groups import STARTS
from idlm_jax.training.objective import MODES, NOISY_TARGETS
from pallas_kernels import KERNELS
from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES

# Dtypes of the forward and backward pass.
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class AdapterSettings:
    """The LoRA of the modes ``lora`` and ``gated-lora``; names follow PEFT."""

    rank: int = 32
    # None: twice the rank, as LlamaFactory has it.
    alpha: float | None = None
    target_modules: tuple[str, ...] = tuple(TARGET_MODULES)
    use_rslora: bool = False
    # A PEFT directory to go on from instead of a fresh adapter.
    start_from: str | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 1e-5
    # Share of the steps over which the learning rate rises from zero, and the share of it that is left at the end.
    warmup: float = 0.03
    final: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    # On matrices only.
    weight_decay: float = 0.0
    # Largest global norm of the gradient; 0 is off.
    clip: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A part of the run with a loss of its own; the curriculum 1 → 2 → 3 is three of them."""

    steps: int
    # B, masks a group: trains strides up to B + 1.
    block_size: int = 3
    # "ce", "kl" or "tv" on noisy rows.
    noisy_loss: str = "ce"
    # α of the clean loss, a number or "auto" (method.md 2.4); not used in gated-lora.
    clean_weight: float | str = 0.2
    # "aligned" (official) or "random" group starts, and noisy rows a clean token.
    starts: str = "random"
    density: float = 1.0


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; -1 (at most once) takes those that are left."""

    data: int = 1
    fsdp: int = -1
    tp: int = 1


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run."""

    # Steps between checkpoints; one is always written at the end.
    every: int = 500
    keep_last: int = 2
    # Also kept: the checkpoints with the best held-out acceptance.
    keep_best: int = 1


@dataclass(frozen=True)
class EvaluationSettings:
    """Measuring on documents that are never trained on."""

    # Documents held out of the data; 0 is off.
    documents: int = 256
    # Steps between measurements; one is always taken at the end.
    every: int = 500


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    # Checkpoint to start from: whatever ``idlm generate`` takes.
    model: str
    # Token stores made by ``idlm data``; the documents of several are shuffled together. One may stand without a list.
    data: tuple[str, ...]
    # Directory of everything that the run writes.
    output: str
    # "full", "lora", "gated-lora", or "ar" for plain fine-tuning.
    mode: str = "gated-lora"
    stages: tuple[Stage, ...] = ()
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    # True: warm-up and cosine run anew in every stage, as when each stage is a run of its own (official).
    schedule_by_stage: bool = False
    # Text or id of the mask token, for a model that names none.
    mask_token: str | None = None
    # Tokens a row, rows a step (of all processes), and parts a step is computed in; fewer where a part would not have a
    # row for every device.
    length: int = 2048
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    # Weights that stay as they are: patterns over names as `idlm train --dry-run` prints them, "embed_tokens.*".
    freeze: tuple[str, ...] = ()
    # Of the forward and backward pass; trained weights are kept in float32.
    dtype: str = "bfloat16"
    # What the backward pass computes again: "none", "dots", "attention" or "block".
    remat: str = "block"
    # "auto": what is fastest here; "xla": no kernels.
    kernels: str = "auto"
    # Losses of method.md 2.4: which noisy rows ("masked", official, or "answer"), whether prompts are learnt too, and
    # whether every document counts the same (None: yes for aligned starts, as in the official code).
    noisy_targets: str = "masked"
    learn_prompts: bool = False
    by_document: bool | None = None
    # The run stops when the smoothed loss exceeds its lowest value by this factor; 0 is off.
    divergence: float = 3.0
    mesh: MeshSettings = field(default_factory=MeshSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    # Also write TensorBoard event files.
    tensorboard: bool = False

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def load_train_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and validate a YAML file; ``overrides`` such as ``optimizer.learning_rate=1e-4`` win over it.

    Raises UserError for a file that cannot be read, unknown or missing keys, and values that make no sense.
    """
    raw: dict[str, Any] = load_yaml(path)
    for text in overrides:
        _override(raw, text)
    try:
        config = _read(raw, TrainConfig, "")
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration, defaults included, as ``load_train_config`` reads it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def write_config(config: TrainConfig, path: Path) -> None:
    """Write ``to_yaml`` to a file, whole or not at all."""
    write_file(path, to_yaml(config))


def validate(config: TrainConfig) -> None:
    """Raise UserError, naming the key, for the first value that does not exist or makes no sense with the others."""
    _named("mode", config.mode, MODES)
    _named("noisy_targets", config.noisy_targets, NOISY_TARGETS)
    _named("dtype", config.dtype, DTYPES)
    _named("remat", config.remat, [remat.value for remat in Remat])
    _named("kernels", config.kernels, KERNELS)
    if not config.stages:
        raise UserError("stages: there is none; give at least one, such as '- {steps: 1000}'")
    for number, stage in enumerate(config.stages):
        _validate_stage(stage, config, f"stages.{number}")
    _validate_mode(config)
    _validate_optimizer(config.optimizer)
    _validate_mesh(config.mesh)
    for key, number, least in (
        ("length", config.length, 2),
        ("batch_size", config.batch_size, 1),
        ("accumulation", config.accumulation, 1),
        ("seed", config.seed, 0),
        ("checkpoint.every", config.checkpoint.every, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("checkpoint.keep_best", config.checkpoint.keep_best, 0),
        ("evaluation.documents", config.evaluation.documents, 0),
        ("evaluation.every", config.evaluation.every, 1),
    ):
        _require(number >= least, key, number, f"at least {least}")
    if config.batch_size % config.accumulation:
        raise UserError(
            f"batch_size: {config.batch_size} rows cannot be cut into {config.accumulation} equal parts (accumulation)"
        )
    factor = config.divergence
    _require(factor == 0 or 1 < factor < math.inf, "divergence", factor, "a factor above 1, or 0 for off")


def _validate_stage(stage: Stage, config: TrainConfig, where: str) -> None:
    _named(f"{where}.noisy_loss", stage.noisy_loss, ROW_LOSSES)
    _named(f"{where}.starts", stage.starts, STARTS)
    _require(stage.steps >= 1, f"{where}.steps", stage.steps, "at least 1")
    _require(
        1 <= stage.block_size < MAX_STRIDE, f"{where}.block_size", stage.block_size, f"between 1 and {MAX_STRIDE - 1}"
    )
    _require(0 < stage.density < math.inf, f"{where}.density", stage.density, "above 0")
    weight = stage.clean_weight
    sensible = weight == "auto" if isinstance(weight, str) else 0 <= weight < math.inf
    _require(sensible, f"{where}.clean_weight", weight, "a number from 0, or 'auto'")
    if stage.starts == "random" and config.by_document:
        raise UserError(
            f"by_document: divides by the tokens of aligned groups, but {where}.starts is random; "
            "set starts: aligned, or leave by_document out"
        )


def _validate_mode(config: TrainConfig) -> None:
    """Refuse what the mode has no use for, unless it is the default, and an adapter that cannot be."""
    unused: list[str] = []
    if config.mode == "ar":
        unused += ["block_size", "noisy_loss", "clean_weight", "starts", "density"]
    if config.mode == "gated-lora":
        unused += ["clean_weight"]
    for number, stage in enumerate(config.stages):
        for name in unused:
            if getattr(stage, name) != getattr(Stage, name):
                raise UserError(f"stages.{number}.{name}: does nothing in mode '{config.mode}'; remove it")
    # The prompt's last row is a clean row.
    if unused and config.noisy_targets != TrainConfig.noisy_targets:
        raise UserError(f"noisy_targets: does nothing in mode '{config.mode}'; remove it")
    adapter = config.adapter
    if not config.mode.endswith("lora") and adapter != AdapterSettings():
        raise UserError(f"adapter: does nothing in mode '{config.mode}', which trains the model itself; remove it")
    _require(adapter.rank >= 1, "adapter.rank", adapter.rank, "at least 1")
    _require(adapter.alpha is None or 0 < adapter.alpha < math.inf, "adapter.alpha", adapter.alpha, "above 0")
    if not adapter.target_modules:
        raise UserError("adapter.target_modules: there is none; give at least one, or leave it out for all")
    for target in adapter.target_modules:
        _named("adapter.target_modules", target, TARGET_MODULES)


def _validate_optimizer(settings: OptimizerSettings) -> None:
    for name, sensible, expected in (
        ("learning_rate", 0 < settings.learning_rate < math.inf, "above 0"),
        ("warmup", 0 <= settings.warmup <= 1, "between 0 and 1"),
        ("final", 0 <= settings.final <= 1, "between 0 and 1"),
        ("beta1", 0 <= settings.beta1 < 1, "from 0 to below 1"),
        ("beta2", 0 <= settings.beta2 < 1, "from 0 to below 1"),
        ("epsilon", 0 < settings.epsilon < math.inf, "above 0"),
        ("weight_decay", 0 <= settings.weight_decay < math.inf, "at least 0"),
        ("clip", 0 <= settings.clip < math.inf, "at least 0"),
    ):
        _require(sensible, f"optimizer.{name}", getattr(settings, name), expected)


def _validate_mesh(mesh: MeshSettings) -> None:
    sizes = dataclasses.asdict(mesh)
    for name, size in sizes.items():
        _require(size == -1 or size >= 1, f"mesh.{name}", size, "at least 1, or -1 for the devices that are left")
    if list(sizes.values()).count(-1) > 1:
        raise UserError("mesh: -1 takes the devices that are left, so at most one axis can have it")


def _require(sensible: bool, key: str, value: Any, expected: str) -> None:
    if not sensible:
        raise UserError(f"{key}: must be {expected}, not {_as_yaml(value)}")


def _named(key: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise UserError(f"{key}: unknown '{name}' (one of {', '.join(known)}){did_you_mean(name, known)}")


def _override(raw: dict[str, Any], text: str) -> None:
    """Put the value of ``a.0.b=value`` into what a YAML file held."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{text}' is not an override; write KEY=VALUE, such as optimizer.learning_rate=1e-4")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"'{text}': the value is not valid YAML: {' '.join(str(error).split())}") from None
    *parents, last = key.strip().split(".")
    node: Any = raw
    for parent in parents:
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}
        node = node[_index(node, parent, text)]
    node[_index(node, last, text)] = parsed


def _index(node: Any, part: str, text: str) -> Any:
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UserError(f"'{text}': '{part}' would be a part of {_as_yaml(node)}, which has none")
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"'{text}': no entry '{part}' in a list of {len(node)} (the first is 0)")
    return int(part)


def _read(value: Any, expected: Any, key: str) -> Any:
    """What YAML gave for ``key`` as a value of the type ``expected``; raises UserError when it is none."""
    if dataclasses.is_dataclass(expected):
        return _read_dataclass(value, expected, key)
    if get_origin(expected) is tuple:
        if isinstance(value, str) and get_args(expected)[0] is str:
            value = [value]
        if not isinstance(value, list):
            raise UserError(f"{key}: must be a list, not {_as_yaml(value)}")
        return tuple(_read(part, get_args(expected)[0], f"{key}.{number}") for number, part in enumerate(value))
    kinds = get_args(expected) or (expected,)
    for kind in kinds:
        with suppress(ValueError):
            return _READERS[kind](value)
    raise UserError(f"{key}: must be {' or '.join(_KIND_NAMES[kind] for kind in kinds)}, not {_as_yaml(value)}")


def _read_dataclass(value: Any, expected: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{key}: must be a mapping of keys to values, not {_as_yaml(value)}")
    prefix = f"{key}." if key else ""
    types = get_type_hints(expected)
    known = [prefix + name for name in types]
    for name in value:
        if prefix + str(name) not in known:
            raise UserError(f"unknown key '{prefix}{name}'{did_you_mean(f'{prefix}{name}', known)}")
    for field_ in dataclasses.fields(expected):
        required = field_.default is dataclasses.MISSING and field_.default_factory is dataclasses.MISSING
        if required and field_.name not in value:
            raise UserError(f"'{prefix}{field_.name}' is missing")
    return expected(**{name: _read(part, types[name], prefix + name) for name, part in value.items()})


def _as_yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _number(value: Any) -> float:
    """A number; as text too, since YAML takes 1e-5 (without a point) for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    """Text; a whole number too, such as the id of a token."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return str(value)


def _instance(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


_READERS: dict[type, Callable[[Any], Any]] = {
    int: _whole_number,
    float: _number,
    str: _text,
    bool: _instance(bool),
    NoneType: _instance(NoneType),
}
_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
