"""The training step of a run, compiled for devices that are not there."""

from dataclasses import replace
from pathlib import Path

import jax

from idlm_jax.backbone.qwen3 import Remat
from idlm_jax.checkpoint.open import open_source
from idlm_jax.checkpoint.source import Configuration, WeightSource
from idlm_jax.checkpoint.summary import read_config
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError
from idlm_jax.planning.report import Report, examine
from idlm_jax.planning.targets import Target, compiling_for
from idlm_jax.training.config import MeshSettings, TrainConfig
from idlm_jax.training.metrics import useful_flops
from idlm_jax.training.plan import AbstractStep, abstract_step, device_bytes
from idlm_jax.training.setup import Setup
from pallas_kernels.linear_cross_entropy.reference import SOFT_LOSSES


def plan_training(config: TrainConfig, target: Target, source: WeightSource, mesh: MeshSettings | None) -> Report:
    """What a step of the widest stage takes there; without a mesh, on the one proposed. Raises UserError."""
    config = replace(config, mesh=mesh) if mesh else proposed(config, source.config, target.count)
    with compiling_for(target) as devices:
        setup = Setup.of(config, source, devices)
        with jax.set_mesh(setup.mesh):
            step = abstract_step(setup)
            given = {
                "weights": device_bytes((step.state.params, step.frozen)),
                "optimizer": device_bytes(step.state.optimizer),
            }
            shape = " ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
            parts = setup.config.accumulation
            mesh_text = shape if parts == 1 else f"{shape}, {parts} parts"
            flops = _flops(setup, step) / target.count
            tokens = config.batch_size * config.length
            return examine(step.lower(), target, mesh_text, tokens, given, flops)


def proposed(config: TrainConfig, model: ModelConfig, devices: int) -> TrainConfig:
    """The run with a mesh for so many devices: its own if that fits, else as little tensor parallelism as will do."""
    own = config.mesh if -1 in (config.mesh.data, config.mesh.fsdp) else MeshSettings()
    for tp in sorted(range(1, devices + 1), key=lambda tp: (tp != own.tp, tp)):
        if devices % tp or model.num_key_value_heads % tp or config.batch_size % (devices // tp):
            continue
        return replace(config, mesh=replace(own, tp=tp))
    raise UserError(
        f"{config.batch_size} rows cannot be split over {devices} devices, nor the {model.num_key_value_heads} key "
        "heads over what is left; give another --batch, or --mesh data=…,fsdp=…,tp=…"
    )


def model_of(config: TrainConfig, path: Path) -> tuple[TrainConfig, WeightSource]:
    """The model that a run starts from, and the run itself; its shapes are enough.

    Where the checkpoint that ``path`` names is not there, ``models/NAME.yaml`` beside the configuration's directory
    stands for it. A mask token that cannot be looked up is any.
    """
    model = Path(config.model).expanduser()
    described = path.resolve().parent.parent / "models" / f"{model.name}.yaml"
    if not model.exists() and described.is_file():
        model = described
    if model.suffix not in (".yaml", ".yml", ".json"):
        return config, open_source(config.model)
    source = Configuration(model, read_config(model))
    if config.mode != "ar":
        config = replace(config, mask_token=str(source.config.vocab_size - 1))
    return config, source


def _flops(setup: Setup, step: AbstractStep) -> float:
    """Of all devices: rows full of one document, each with loss."""
    config, adapter = setup.config, setup.builder.adapter
    tokens = config.batch_size * config.length
    return useful_flops(
        setup.builder.config,
        config.mode,
        tokens=tokens,
        noisy_rows=config.batch_size * step.noisy_rows,
        length=config.length,
        block_size=step.objective.groups.block_size,
        clean_rows=tokens,
        rank=adapter.rank if adapter else 0,
        target_modules=adapter.target_modules if adapter else (),
        soft=step.objective.noisy_loss in SOFT_LOSSES,
        again=Remat(config.remat) is not Remat.NONE,
    )
