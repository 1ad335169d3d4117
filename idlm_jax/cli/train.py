"""``idlm train``: turn an autoregressive model into an introspective diffusion model."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from idlm_jax.cli.render import Notice, make_console
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.training.config import TrainConfig


@dataclass(frozen=True)
class ProcessFlags:
    """The other processes of a run on several hosts; each host (or device) runs the same command."""

    # Join the processes of this job, as Slurm, Open MPI, Kubernetes (JobSet) or Cloud TPU tell of them.
    distributed: bool = False
    # Without such a launcher: HOST:PORT of process 0, how many there are, and which one this is.
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint="(default: the launcher's)")] = None
    num_processes: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: the launcher's)")] = None
    process_id: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="(default: the launcher's)")] = None

    def join(self) -> None:
        """Let JAX see the devices of all processes; raises UserError where there is nothing to join."""
        named = self.coordinator, self.num_processes, self.process_id
        if any(value is not None for value in named) and None in named:
            raise UserError("--coordinator, --num-processes and --process-id belong together; give all three")
        if not self.distributed and self.coordinator is None:
            return
        import jax

        try:
            jax.distributed.initialize(*named)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot join the other processes ({str(error).splitlines()[0]}); start this by srun, mpirun, JobSet "
                "or on a TPU slice, or give --coordinator, --num-processes and --process-id"
            ) from None


def train(
    config: Positional[Annotated[Path, arg(metavar="CONFIG.yaml")]],
    *,
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: the file's)")] = None,
    data: Annotated[str | None, arg(metavar="STORE", help_behavior_hint="(default: the file's)")] = None,
    output: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="(default: the file's)")] = None,
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = (),
    resume: bool = False,
    dry_run: bool = False,
    processes: Annotated[ProcessFlags, arg(name="")] = ProcessFlags(),
) -> int:
    """Train a model, or a gated adapter that leaves it untouched, to predict several next tokens.

    Everything is written into the output directory: the resolved configuration, metrics of every step (metrics.jsonl,
    loss_curve.png), checkpoints to resume from, and at the end the adapter or the model. Ctrl-C or SIGTERM saves a
    checkpoint before it stops.

    Examples:
      idlm data synthesize models/smollm2 --output data/smollm2 --tokens 30e6
      idlm train configs/train/smollm2_gated_lora_n4.yaml --data data/smollm2 --output runs/gated --dry-run
      idlm train configs/train/smollm2_gated_lora_n4.yaml --data data/smollm2 --output runs/gated
      idlm train runs/gated/config.yaml --resume
      idlm train configs/train/smollm2_full.yaml --output runs/full --set optimizer.learning_rate=2e-5
      srun idlm train configs/train/smollm2_full.yaml --output /shared/runs/full --distributed

    Args:
        config: What to train and how; see configs/train.
        model: Checkpoint to start from.
        data: Token store made by `idlm data`.
        output: Directory of everything that the run writes.
        set: Change one setting of the file; stages are numbered from 0 (stages.0.steps=100). Repeat for several.
        resume: Go on with the run in the output directory from its newest whole checkpoint.
        dry_run: Print mesh, parameters, memory on one device and tokens a step, and stop.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("idlm_jax").setLevel(logging.INFO)
    logging.getLogger("pallas_kernels").setLevel(logging.INFO)
    given = [f"{key}={value}" for key, value in (("model", model), ("data", data), ("output", output)) if value]
    with Notice("starting JAX"):
        from idlm_jax.training.config import load_train_config

        settings = load_train_config(config, [*given, *set])
        processes.join()
    if dry_run:
        _show_plan(settings)
        return 0
    from idlm_jax.training.loop import train as run

    try:
        outcome = run(settings, resume)
    except KeyboardInterrupt:
        print("idlm: interrupted", file=sys.stderr, flush=True)
        # At once: Python would wait for the threads of a save in progress.
        os._exit(130)
    if outcome.reason != "finished":
        print(f"idlm: stopped by {outcome.reason} at step {outcome.step}; go on with --resume", file=sys.stderr)
        return 143 if outcome.reason == "SIGTERM" else 130
    console = make_console()
    console.print(f"{outcome.step} steps done; written: {outcome.result}", soft_wrap=True)
    if outcome.acceptance is not None:
        from idlm_jax.cli.eval_acceptance import acceptance_table

        console.print(acceptance_table(outcome.acceptance))
    return 0


def _show_plan(settings: "TrainConfig") -> None:
    from idlm_jax.checkpoint.atomic import gigabytes
    from idlm_jax.training.plan import plan

    with Notice("compiling the training step"):
        result = plan(settings)
    console = make_console()
    console.print(f"mesh: {result.mesh} ({result.devices})", soft_wrap=True)
    console.print(f"a step: {result.rows} rows × {settings.length} = {result.tokens} tokens, {result.noisy_rows} masks")
    table = Table("weight", "shape", "dtype", "bytes a device", "", box=SIMPLE_HEAD, pad_edge=False)
    for name, shape, dtype, size, trained in result.weights:
        table.add_row(name, "×".join(map(str, shape)), dtype, gigabytes(size), "trained" if trained else "frozen")
    console.print(table)
    memory = Table("memory a device", "", box=SIMPLE_HEAD, pad_edge=False)
    for name, size in result.memory.items():
        memory.add_row(name, gigabytes(size))
    console.print(memory)
