"""``idlm plan train``: what a training step would take on devices that are not there."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from idlm_jax.cli.plans import Targets, make_plans, parse_mesh, without_accelerators
from idlm_jax.cli.render import Notice

_FILE = "(default: the file's)"


def plan_train(
    config: Positional[Annotated[Path, arg(metavar="CONFIG.yaml")]],
    *,
    target: Targets,
    mesh: Annotated[
        str | None, arg(metavar="data=D,fsdp=F,tp=T", help_behavior_hint="(default: proposed, and printed)")
    ] = None,
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint=_FILE)] = None,
    length: Annotated[int | None, arg(metavar="TOKENS", help_behavior_hint=_FILE)] = None,
    batch: Annotated[int | None, arg(metavar="ROWS", help_behavior_hint=_FILE)] = None,
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = (),
    json: bool = False,
) -> None:
    """Compile the step of a training run for GPUs or TPUs that are not there, and tell what it takes.

    It is the step that `idlm train` would run there, with the kernels of that platform, made for shapes alone: neither
    weights nor accelerators are needed, but the compiler, from the extra "tpu" or "gpu". Memory and collectives are
    those of the compiled program. The time is an estimate from below: FLOPs, bytes of memory and bytes of links, each
    at the full rate of the chip's data sheet. A model that is not there is taken from configs/models.

    Targets are h100xN and h200xN (GPUs of one host), v5e-N, v5p-N and v6e-N (chips of a TPU slice).

    Examples:
      idlm plan train configs/train/qwen3-8b_gated_lora_r128.yaml --target h100x8 v5e-16 v6e-8
      idlm plan train configs/train/qwen3-0.6b_full.yaml --model configs/models/qwen3-8b.yaml --target v5p-64 --batch 64
      idlm plan train configs/train/qwen3-8b_gated_lora_r128.yaml --target v5e-16 --mesh data=1,fsdp=8,tp=2 --json

    Args:
        config: What to train and how; see configs/train.
        target: Kind and number of chips; several are compiled for one after the other.
        mesh: Devices along each axis; -1 takes those that are left.
        model: A YAML file of configs/models, or any checkpoint, whose weights are not read.
        length: Tokens a row.
        batch: Rows a step, on all devices; computed in as many parts as the file says, or fewer.
        set: Change one setting of the file; repeat for several.
        json: Print one JSON object a target.
    """
    with Notice("starting JAX"):
        without_accelerators()
        from idlm_jax.planning.training import model_of, plan_training
        from idlm_jax.training.config import load_train_config

        named = (("model", model), ("length", length), ("batch_size", batch))
        given = [f"{key}={value}" for key, value in named if value is not None]
        if batch is not None and not any(text.startswith("accumulation=") for text in set):
            parts = load_train_config(config, set).accumulation
            given.append(f"accumulation={max(n for n in range(1, parts + 1) if batch % n == 0)}")
        settings, source = model_of(load_train_config(config, [*given, *set]), config)
    asked = None if mesh is None else parse_mesh(mesh)
    make_plans(target, lambda one: plan_training(settings, one, source, asked), json)
