"""The training loop: steps, metrics read a step late, measurements, checkpoints, and every way a run can end."""

import io
import signal
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from idlm_jax.backbone.weights import layer_weights
from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.checkpoint.peft import save_adapter
from idlm_jax.data.tokens import tokenizer_hash
from idlm_jax.errors import UserError
from idlm_jax.evaluation.acceptance import AcceptanceReport, measure
from idlm_jax.training.checkpoints import Checkpoints
from idlm_jax.training.config import Stage, TrainConfig, write_config
from idlm_jax.training.export import save_model
from idlm_jax.training.metrics import RunLog, Throughput, document_tokens, plot, useful_flops
from idlm_jax.training.objective import Losses
from idlm_jax.training.params import Flat
from idlm_jax.training.setup import Data, Setup, output_directory, trained_adapter
from idlm_jax.training.step import StepResult, learning_rate_schedule, make_train_step, objective_of

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
    # As last measured, if it was.
    acceptance: AcceptanceReport | None


def train(config: TrainConfig, resume: bool = False) -> Outcome:
    """Run a training from its configuration, or go on with one; raises UserError for whatever the user can mend.

    Everything is written into ``config.output``: the resolved configuration, ``metrics.jsonl``, ``checkpoints/``,
    ``loss_curve.png``, and at the end ``adapter/`` (LoRA modes) or ``model/``. On SIGTERM or SIGINT it ends after the
    step with a checkpoint; a second one has its usual effect.
    """
    output = output_directory(config)
    result = output / ("adapter" if config.mode.endswith("lora") else "model")
    checkpoints = output / "checkpoints"
    holds_run = checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir())
    if resume and not holds_run:
        raise UserError(f"{output} holds no checkpoint to go on from; leave out --resume, or give another --output")
    if not resume and (holds_run or result.exists()):
        raise UserError(f"{output} holds a run already; go on with it (--resume) or give another --output")
    setup = Setup.from_config(config)
    data = Data.open(setup)
    try:
        with jax.set_mesh(setup.mesh), closing(data.training()) as iterator:
            return _Run(setup, data, output, result, iterator).run(resume)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device has no memory left: train with a smaller batch_size, more parts a step (accumulation), or "
            "remat: block; --dry-run tells the memory beforehand"
        ) from None


@dataclass
class _Run:
    setup: Setup
    data: Data
    output: Path
    # Where the trained adapter or model goes.
    result: Path
    # Of Grain, over the training rows.
    iterator: Any
    # Host copies of the batches of the last steps, for what is counted in them and the post-mortem of a bad step.
    recent: deque[tuple[int, dict[str, np.ndarray]]] = field(default_factory=lambda: deque(maxlen=2))
    # The last measurement and the steps done at it.
    acceptance: AcceptanceReport | None = None
    acceptance_step: int = -1
    smoothed: float | None = None
    lowest: float = float("inf")

    def run(self, resume: bool) -> Outcome:
        config = self.setup.config
        with _writable(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        self.state, self.frozen = self.setup.start()
        with Checkpoints(self.output, config.checkpoint, _fingerprint(self.setup, self.data)) as self.checkpoints:
            if resume:
                self._restore()
            begin = int(self.state.step)
            with _writable(self.output):
                if jax.process_index() == 0:
                    write_config(config, self.output / "config.yaml")
                self.log = RunLog(
                    self.output,
                    total_steps=config.steps,
                    resume_step=begin,
                    process_index=jax.process_index(),
                    tensorboard=config.tensorboard,
                )
            with self.log, _stop_signals() as stop:
                reason = self._steps(begin, stop)
                step = int(self.state.step)
                self._save(step, wait=True)
        if reason == "finished":
            self._write_result()
        if jax.process_index() == 0:
            self._plot()
        return Outcome(step, reason, self.result if reason == "finished" else None, self.acceptance)

    def _restore(self) -> None:
        abstract = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), self.state
        )
        restored = self.checkpoints.restore(abstract, self.iterator)
        if restored is None:
            raise UserError(f"{self.output} holds no whole checkpoint to go on from; train without --resume")
        step, self.state = restored
        # A run that was stopped after its last checkpoint still has its result to write.
        if step >= self.setup.config.steps and self._has_result_of(step):
            raise UserError(f"{self.output} is trained to its last step ({step}); raise the steps to go on")

    def _has_result_of(self, step: int) -> bool:
        checkpoint = self.checkpoints.directory / str(step)
        return self.result.exists() and self.result.stat().st_mtime >= checkpoint.stat().st_mtime

    def _steps(self, begin: int, stop: list[str]) -> str:
        """Run the steps; each one's numbers are read when the next is on its way."""
        config = self.setup.config
        self.throughput = Throughput(jax.device_count())
        late: tuple[int, StepResult] | None = None
        for number, step in self._schedule(begin):
            if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(number):
                stop.append("SIGTERM")
            if stop:
                break
            arrays = next(self.iterator)
            self.recent.append((number, arrays))
            self.state, result = step(self.state, self.frozen, self.setup.place(arrays, config.accumulation))
            if late:
                self._report(*late)
            late = (number, result)
            done = number + 1
            last = done == config.steps
            if done % config.evaluation.every == 0 or last:
                self._evaluate(done)
            if done % config.checkpoint.every == 0 and not last:
                # A state that went wrong must not become a checkpoint.
                self._report(*late)
                late = None
                self._save(done)
        if late:
            self._report(*late)
        return stop[0] if stop else "finished"

    def _schedule(self, begin: int) -> Iterator[tuple[int, jax.stages.Wrapped]]:
        """The numbers of the steps that are left, from 0, each with the compiled step of its stage."""
        config = self.setup.config
        first = 0
        for index, stage in enumerate(config.stages):
            if begin < first + stage.steps:
                self.smoothed, self.lowest = None, float("inf")
                objective = objective_of(config, stage)
                step = make_train_step(self.setup.builder, objective, self.setup.optimizer, config.seed)
                _tell(f"stage {index + 1} of {len(config.stages)}: {_describe(config, stage)}; compiling its step …")
                for number in range(max(begin, first), first + stage.steps):
                    yield number, step
            first += stage.steps

    def _report(self, number: int, result: StepResult) -> None:
        """Write the numbers of a step; raises UserError where they say that the run has gone wrong."""
        losses = jax.device_get(result.losses)
        values = self._values(number, losses, float(result.gradient_norm))
        if self.acceptance is not None and self.acceptance_step == number + 1:
            values |= acceptance_values(self.acceptance)
        self.log.log(number + 1, values)
        if losses.noisy_rows or losses.clean_rows:
            self._check_loss(number, float(losses.total), bool(result.finite))
        elif number == 0:
            raise UserError("no token of the first batch carries loss; check the loss mask of the data")

    def _values(self, number: int, losses: Losses, gradient_norm: float) -> dict[str, Any]:
        """The numbers of a step, on all processes, for metrics.jsonl."""
        config = self.setup.config
        index, stage = _stage_at(config, number)
        arrays = self._arrays_of(number)
        tokens, document_length = document_tokens(arrays["segment_ids"], arrays["positions"])
        adapter = self.setup.builder.adapter
        flops = useful_flops(
            self.setup.builder.config,
            config.mode,
            tokens=tokens,
            noisy_rows=int(losses.noisy_rows),
            length=document_length,
            block_size=stage.block_size,
            clean_rows=int(losses.clean_rows),
            rank=adapter.rank if adapter else 0,
            target_modules=adapter.target_modules if adapter else (),
            soft=stage.noisy_loss != "ce",
        )
        values: dict[str, Any] = {"stage": index, "loss": float(losses.total), "loss_clean": float(losses.clean)}
        if config.mode != "ar":
            values |= {
                "loss_noisy": float(losses.noisy),
                "noisy_loss": stage.noisy_loss,
                "noisy_by_depth": [float(value) for value in losses.noisy_by_depth],
                "block_size": stage.block_size,
                "groups_left_out": int(losses.left_out),
            }
        return values | {
            "noisy_rows": int(losses.noisy_rows),
            "clean_rows": int(losses.clean_rows),
            "tokens": tokens,
            "gradient_norm": gradient_norm,
            "learning_rate": float(np.asarray(learning_rate_schedule(config)(number))),
            **self.throughput.step(tokens, flops),
        }

    def _check_loss(self, number: int, loss: float, finite: bool) -> None:
        """Stop on a loss that is not a number or has run away, with the inputs of the step saved."""
        if not finite:
            self._stop_bad(number, f"the loss ({loss:.3g}) or its gradient is not a finite number")
        self.smoothed = loss if self.smoothed is None else (1 - _SMOOTHING) * self.smoothed + _SMOOTHING * loss
        self.lowest = min(self.lowest, self.smoothed)
        factor = self.setup.config.divergence
        if factor and number >= _SETTLE and self.smoothed > factor * self.lowest:
            self._stop_bad(number, f"the smoothed loss is {self.smoothed:.3g}, its lowest was {self.lowest:.3g}")

    def _stop_bad(self, number: int, what: str) -> None:
        file = self.output / f"bad_step_{number + 1}.process_{jax.process_index()}.npz"
        content = io.BytesIO()
        inputs: dict[str, Any] = {"step": number, "seed": self.setup.config.seed, **self._arrays_of(number)}
        np.savez_compressed(content, **inputs)
        try:
            write_file(file, content.getvalue())
            where = f"the step's inputs are in {file}"
        except OSError as error:
            where = f"the step's inputs could not be written ({error.strerror})"
        self.checkpoints.wait()
        steps = self.checkpoints.steps
        advice = f"go on from step {steps[-1]} (--resume)" if steps else "start again"
        raise UserError(f"step {number + 1}: {what}; {where}; {advice} with a lower optimizer.learning_rate")

    def _arrays_of(self, number: int) -> dict[str, np.ndarray]:
        return next(arrays for step, arrays in self.recent if step == number)

    def _evaluate(self, done: int) -> None:
        config = self.setup.config
        if not config.evaluation.documents or config.mode == "ar":
            return
        self.acceptance = measure(
            self.setup.builder,
            {**self.frozen, **self.state.params},
            self.data.held_out(),
            _stage_at(config, done - 1)[1].block_size,
            gated=config.mode != "lora",
            seed=config.seed,
            attention=config.kernels,
        )
        self.acceptance_step = done

    def _save(self, step: int, wait: bool = False) -> None:
        fresh = self.acceptance if self.acceptance_step == step else None
        metric = sum(fresh.temperatures[0].prefix) if fresh else None
        self.checkpoints.save(step, self.state, self.iterator, metric, wait=wait)

    def _write_result(self) -> None:
        params: Flat = self.state.params
        if not self.setup.builder.adapter:
            save_model(self.setup.source, self.setup.builder.config, {**self.frozen, **params}, self.result)
            return
        adapter = trained_adapter(self.setup, params)
        if jax.process_index() == 0:
            save_adapter(adapter, self.result, self.setup.config.model, overwrite=True)

    def _plot(self) -> None:
        try:
            plot(self.output)
        except OSError as error:
            _tell(f"cannot draw the curves of {self.output} ({error.strerror})")


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


def _fingerprint(setup: Setup, data: Data) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit a run."""
    builder, config = setup.builder, setup.config
    adapter = asdict(builder.adapter) if builder.adapter else {}
    # The base may have been moved; one of its matrices tells whether it is the same.
    adapter.pop("base_model", None)
    matrix = next(weight for weight in layer_weights(builder.config, 0) if weight.path.endswith("k_proj.kernel"))
    lengths = data.documents.lengths()
    return {
        "mode": config.mode,
        "model": asdict(builder.config),
        "base_weights": zlib.crc32(np.ascontiguousarray(setup.source.read(matrix)).view(np.uint8)),
        "adapter": adapter,
        "tokenizer": tokenizer_hash(setup.source.tokenizer()),
        "freeze": list(config.freeze),
        # The position in the data means nothing in other data, or in rows packed otherwise.
        "data": {
            "documents": len(lengths),
            "document_lengths": zlib.crc32(lengths),
            "length": config.length,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "held_out": config.evaluation.documents,
        },
    }


def _describe(config: TrainConfig, stage: Stage) -> str:
    loss = "next-token loss" if config.mode == "ar" else f"B = {stage.block_size}, {stage.noisy_loss}, {stage.starts}"
    return f"{stage.steps} steps, {loss}"


def _tell(line: str) -> None:
    """One line on stderr, once for all processes, above a progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    """The errors of a place that cannot be written to, as the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from None


def _stage_at(config: TrainConfig, number: int) -> tuple[int, Stage]:
    """The stage of a step, both counted from 0."""
    for index, stage in enumerate(config.stages):
        if number < stage.steps:
            return index, stage
        number -= stage.steps
    raise ValueError("there is no such step")


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that a SIGTERM or SIGINT puts its name into, so that the loop ends after a whole step and saves.

    From then on both do what they did before: whoever sends a second one wants no checkpoint. Of several processes all
    must stop after the same step; there JAX's runtime takes SIGTERM and tells the others, and SIGINT stops at once.
    """
    stop: list[str] = []
    if jax.process_count() > 1:
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.append(signal.Signals(number).name)
        restore()
        _tell(f"{stop[0]}: saving after this step (once more to stop at once)")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        restore()
