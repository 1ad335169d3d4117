"""The training loop: steps, metrics read a step late, measurements, checkpoints, and every way a run can end."""

import logging
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idlm_jax.checkpoint.peft import save_adapter
from idlm_jax.data.tokens import tokenizer_hash
from idlm_jax.errors import UserError
from idlm_jax.evaluation.acceptance import AcceptanceReport, measure
from idlm_jax.training.checkpoints import Checkpoints
from idlm_jax.training.config import Stage, TrainConfig, write_config
from idlm_jax.training.export import save_model
from idlm_jax.training.metrics import RunLog, Throughput, document_tokens, plot, useful_flops
from idlm_jax.training.params import Flat
from idlm_jax.training.setup import Data, Setup, output_directory, trained_adapter
from idlm_jax.training.step import (
    StepResult,
    learning_rate_schedule,
    make_train_step,
    objective_of,
)

_log = logging.getLogger(__name__)
# Weight of the newest loss in the smoothed one that divergence is judged by, and steps before it is judged.
_SMOOTHING, _SETTLE = 0.1, 50


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    # "finished", or the name of the signal that stopped it.
    reason: str
    # The trained adapter or model, where the run finished.
    result: Path | None
    acceptance: AcceptanceReport | None


def train(config: TrainConfig, resume: bool = False) -> Outcome:
    """Run a training from its configuration, or go on with one; raises UserError for whatever the user can mend.

    Everything is written into ``config.output``: the resolved configuration, ``metrics.jsonl``, ``checkpoints/``,
    ``loss_curve.png``, and at the end ``adapter/`` (LoRA modes) or ``model/``.
    """
    output = output_directory(config)
    if (output / "checkpoints").exists() and not resume:
        raise UserError(f"{output} holds a run already; go on with it (--resume) or give another --output")
    setup = Setup.from_config(config)
    data = Data.open(setup)
    with jax.set_mesh(setup.mesh):
        return _Run(setup, data, output, resume).run()


@dataclass
class _Run:
    setup: Setup
    data: Data
    output: Path
    resume: bool
    # Host copies of the batches of the last steps, for the post-mortem of a step that went wrong.
    recent: deque = field(default_factory=lambda: deque(maxlen=2))
    acceptance: AcceptanceReport | None = None
    acceptance_step: int = -1
    smoothed: float | None = None
    lowest: float = float("inf")

    def run(self) -> Outcome:
        config = self.setup.config
        self.iterator = self.data.training()
        self.state, self.frozen = self.setup.start()
        self.output.mkdir(parents=True, exist_ok=True)
        with Checkpoints(self.output, config.checkpoint, self._fingerprint()) as self.checkpoints:
            self._restore()
            if jax.process_index() == 0:
                write_config(config, self.output / "config.yaml")
            begin = int(self.state.step)
            with (
                RunLog(
                    self.output,
                    total_steps=config.steps,
                    resume_step=begin,
                    process_index=jax.process_index(),
                    tensorboard=config.tensorboard,
                ) as self.log,
                _stop_signals() as stop,
            ):
                reason = self._steps(begin, stop)
                step = int(self.state.step)
                self._save(step, wait=True)
        result = self._write_result() if reason == "finished" else None
        if jax.process_index() == 0:
            plot(self.output)
        return Outcome(step, reason, result, self.acceptance)

    def _restore(self) -> None:
        if not self.resume:
            return
        abstract = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), self.state
        )
        restored = self.checkpoints.restore(abstract, self.iterator)
        if restored is None:
            raise UserError(f"{self.output} holds no whole checkpoint to go on from; train without --resume")
        step, self.state = restored
        if step >= self.setup.config.steps:
            raise UserError(f"{self.output} is trained to its last step ({step}); raise the steps to go on")

    def _steps(self, begin: int, stop: list[str]) -> str:
        """Run the steps; each one's numbers are read when the next is on its way."""
        config = self.setup.config
        throughput = Throughput(jax.device_count())
        late: tuple[int, Stage, StepResult] | None = None
        number = begin
        for number, stage, step in self._schedule(begin):
            if stop:
                break
            arrays = next(self.iterator)
            self.recent.append((number, arrays))
            self.state, result = step(self.state, self.frozen, self.setup.place(arrays))
            if late is not None:
                self._report(*late, throughput)
            late = (number, stage, result)
            done = number + 1
            last = done == config.steps
            if done % config.evaluation.every == 0 or last:
                self._evaluate(done)
            if done % config.checkpoint.every == 0 and not last:
                self._report(*late, throughput)
                late = None
                self._save(done)
        if late is not None:
            self._report(*late, throughput)
        return stop[0] if stop else "finished"

    def _schedule(self, begin: int) -> Iterator[tuple[int, Stage, jax.stages.Wrapped]]:
        config = self.setup.config
        first = 0
        for stage in config.stages:
            if begin < first + stage.steps:
                self.smoothed, self.lowest = None, float("inf")
                step = make_train_step(
                    self.setup.builder, objective_of(config, stage), self.setup.optimizer, config.seed
                )
                for number in range(max(begin, first), first + stage.steps):
                    yield number, stage, step
            first += stage.steps

    def _report(self, number: int, stage: Stage, result: StepResult, throughput: Throughput) -> None:
        config = self.setup.config
        losses = jax.device_get(result.losses)
        norm, finite = float(result.gradient_norm), bool(result.finite)
        noisy_rows, clean_rows = int(losses.noisy_rows), int(losses.clean_rows)
        arrays = self._arrays_of(number)
        # Of this process; the others have as many but for the padding.
        tokens, document_length = document_tokens(arrays["segment_ids"], arrays["positions"])
        tokens *= jax.process_count()
        adapter = self.setup.builder.adapter
        flops = useful_flops(
            self.setup.builder.config,
            config.mode,
            tokens=tokens,
            noisy_rows=noisy_rows,
            length=document_length,
            block_size=stage.block_size,
            clean_rows=clean_rows,
            rank=adapter.rank if adapter else 0,
            target_modules=adapter.target_modules if adapter else (),
            soft=stage.noisy_loss != "ce",
        )
        values: dict[str, Any] = {
            "loss": float(losses.total),
            "loss_noisy": float(losses.noisy),
            "loss_clean": float(losses.clean),
            "noisy_by_depth": [float(value) for value in losses.noisy_by_depth],
            "noisy_rows": noisy_rows,
            "clean_rows": clean_rows,
            "tokens": tokens,
            "groups_left_out": int(losses.left_out),
            "gradient_norm": norm,
            "learning_rate": float(learning_rate_schedule(config)(number)),
            "block_size": stage.block_size,
            **throughput.step(tokens, flops),
        }
        if self.acceptance is not None and self.acceptance_step == number:
            values |= acceptance_values(self.acceptance)
        self.log.log(number + 1, values)
        if noisy_rows == 0 and clean_rows == 0:
            raise UserError(f"step {number + 1}: no token of the batch carries loss; check the loss mask of the data")
        self._check_loss(number, float(losses.total), finite)

    def _check_loss(self, number: int, loss: float, finite: bool) -> None:
        """Stop on a loss that is not a number or has run away, with the inputs of the step saved."""
        if not finite:
            self._stop_bad(number, f"loss {loss} or its gradient is not a number")
        self.smoothed = loss if self.smoothed is None else (1 - _SMOOTHING) * self.smoothed + _SMOOTHING * loss
        self.lowest = min(self.lowest, self.smoothed)
        factor = self.setup.config.divergence
        if factor and number >= _SETTLE and self.smoothed > factor * self.lowest:
            self._stop_bad(number, f"the smoothed loss is {self.smoothed:.3g}, its lowest was {self.lowest:.3g}")

    def _stop_bad(self, number: int, what: str) -> None:
        file = self.output / f"bad_step_{number + 1}.process_{jax.process_index()}.npz"
        np.savez_compressed(file, step=number, seed=self.setup.config.seed, **self._arrays_of(number))
        raise UserError(
            f"step {number + 1}: {what}; stopped. The step's inputs are in {file}, the last checkpoint stays: resume "
            "with a lower learning rate, or start again"
        )

    def _arrays_of(self, number: int) -> dict[str, np.ndarray]:
        return next(arrays for step, arrays in self.recent if step == number)

    def _evaluate(self, step: int) -> None:
        config = self.setup.config
        if not config.evaluation.documents or config.mode == "ar":
            return
        stage = _stage_at(config, step - 1)
        self.acceptance = measure(
            self.setup.builder,
            {**self.frozen, **self.state.params},
            self.data.held_out(),
            stage.block_size,
            gated=config.mode != "lora",
            seed=config.seed,
            attention=config.attention,
            chunk=config.loss_chunk,
        )
        self.acceptance_step = step - 1

    def _save(self, step: int, wait: bool = False) -> None:
        fresh = self.acceptance if self.acceptance_step == step - 1 else None
        metric = sum(fresh.temperatures[0].prefix) if fresh else None
        self.checkpoints.save(step, self.state, self.iterator, metric, wait=wait)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to fit this run."""
        builder, config = self.setup.builder, self.setup.config
        return {
            "mode": config.mode,
            "model": str(builder.config),
            "adapter": str(builder.adapter),
            "tokenizer": tokenizer_hash(self.setup.source.tokenizer()),
            "frozen": list(config.freeze),
        }

    def _write_result(self) -> Path:
        params: Flat = self.state.params
        if self.setup.builder.adapter:
            target = self.output / "adapter"
            adapter = trained_adapter(self.setup, params)
            if jax.process_index() == 0:
                save_adapter(adapter, target, self.setup.config.model, overwrite=True)
            return target
        target = self.output / "model"
        save_model(self.setup.source, self.setup.builder.config, {**self.frozen, **params}, target)
        return target


def acceptance_values(report: AcceptanceReport) -> dict[str, Any]:
    """A report as entries of the metrics."""
    sampled, greedy = report.temperatures[0], report.temperatures[-1]
    return {
        "acceptance": list(sampled.by_depth),
        "acceptance_prefix": list(sampled.prefix),
        "acceptance_greedy": list(greedy.by_depth),
        "acceptance_greedy_prefix": list(greedy.prefix),
        "held_out_clean_loss": report.clean_loss,
    }


def _stage_at(config: TrainConfig, number: int) -> Stage:
    for stage in config.stages:
        if number < stage.steps:
            return stage
        number -= stage.steps
    return config.stages[-1]


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that a SIGTERM or SIGINT puts its name into, so that the loop ends after a whole step and saves."""
    stop: list[str] = []

    def handle(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if stop:
            raise KeyboardInterrupt
        stop.append(name)
        print(f"\n{name}: saving after this step (once more to stop at once)", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
