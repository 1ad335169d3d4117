"""The training loop: what a run writes, how it ends, and that one which was broken off goes on bit for bit."""

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import weight_table
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.errors import UserError
from idlm_jax.evaluation.acceptance import evaluate_store
from idlm_jax.training import loop
from idlm_jax.training.checkpoints import Checkpoints
from idlm_jax.training.config import TrainConfig, load_train_config
from idlm_jax.training.loop import Outcome, acceptance_values
from idlm_jax.training.metrics import RunLog
from idlm_jax.training.setup import Data, Setup
from tests.training.limits import files_limited_to
from tests.training.runs import (
    MODEL,
    STEPS,
    checkpoints,
    make_store,
    numbers,
    shared_compilations,
    start,
    write_settings,
)

# The first step at this rate makes weights that overflow in the second.
HUGE = "optimizer.learning_rate=1e38"


@dataclass(frozen=True)
class Runs:
    """A run that nothing disturbed, and what others need to be compared with it."""

    settings: Path
    store: Path
    # What it wrote.
    whole: Path
    outcome: Outcome
    # Of processes that need not compile again what was compiled here.
    environment: dict[str, str]

    def config(self, output: Path, *changes: str) -> TrainConfig:
        return load_train_config(self.settings, [f"output={output}", *changes])

    def train(self, output: Path, *changes: str, resume: bool = False) -> Outcome:
        return loop.train(self.config(output, *changes), resume)

    def copy_of_whole(self, output: Path) -> Path:
        """As if it had just ended, in a place of its own."""
        return shutil.copytree(self.whole, output)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    store = make_store(folder / "store")
    settings = write_settings(folder / "settings.yaml", store, folder / "whole")
    with shared_compilations(tmp_path_factory) as environment:
        outcome = loop.train(load_train_config(settings))
        yield Runs(settings, store, folder / "whole", outcome, environment)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], None]) -> None:
    """Once, when the numbers of a step have been written."""
    log, done = RunLog.log, []

    def log_and_do(self: RunLog, number: int, values: Any) -> None:
        log(self, number, values)
        if number == step and not done:
            done.append(number)
            do()

    monkeypatch.setattr(RunLog, "log", log_and_do)


def stopped_at(runs: Runs, output: Path, step: int, *changes: str) -> Outcome:
    """A run that a SIGTERM ended when the numbers of ``step`` were written: one step later."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        return runs.train(output, *changes)


def test_a_run_leaves_its_configuration_numbers_curves_checkpoints_and_adapter(runs: Runs) -> None:
    assert {path.name for path in runs.whole.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "loss_curve.png",
        "checkpoints",
        "adapter",
    }
    assert load_train_config(runs.whole / "config.yaml") == runs.config(runs.whole)
    assert imread(runs.whole / "loss_curve.png").shape[0] > 500
    assert (runs.outcome.step, runs.outcome.reason, runs.outcome.result) == (STEPS, "finished", runs.whole / "adapter")


def test_every_step_has_its_line_with_all_numbers(runs: Runs) -> None:
    entries = numbers(runs.whole)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for entry in entries:
        assert len(entry["noisy_by_depth"]) == entry["block_size"]
        assert entry["loss"] == entry["loss_noisy"] > 0 == entry["loss_clean"]
        assert entry["gradient_norm"] > 0 and entry["learning_rate"] > 0 and entry["groups_left_out"] == 0
        # Rows of 64 tokens, 4 of them, hardly filled to the last; 48 noisy rows are 16 groups of 3.
        most = 4 * {1: 64, 2: 64, 3: 48}[entry["block_size"]]
        assert 150 < entry["tokens"] <= 256 and 0 < entry["noisy_rows"] <= most and entry["clean_rows"] == 0
        assert ("acceptance" in entry) == (entry["step"] in (20, 40))
    (first, last) = (entry for entry in entries if "acceptance" in entry)
    for measured in (first, last):
        assert len(measured["acceptance"]) == len(measured["acceptance_greedy_prefix"]) == 3
    assert runs.outcome.acceptance is not None
    assert acceptance_values(runs.outcome.acceptance).items() <= last.items()


def test_a_curriculum_changes_block_size_and_loss_and_each_stage_has_a_schedule_of_its_own(runs: Runs) -> None:
    entries = numbers(runs.whole)
    of_stage = [[entry for entry in entries if entry["stage"] == stage] for stage in range(3)]
    assert [len(part) for part in of_stage] == [5, 10, 25]
    for part, block_size, loss in zip(of_stage, (1, 2, 3), ("kl", "kl", "tv"), strict=True):
        assert {(entry["block_size"], entry["noisy_loss"]) for entry in part} == {(block_size, loss)}
        rates = [entry["learning_rate"] for entry in part]
        assert max(rates) == pytest.approx(1e-2) and max(rates) in rates[:2] and rates[-1] < 5e-3


def test_the_last_checkpoints_and_the_best_are_kept(runs: Runs) -> None:
    measured = {
        entry["step"]: sum(entry["acceptance_prefix"]) for entry in numbers(runs.whole) if entry["step"] % 20 == 0
    }
    assert checkpoints(runs.whole) == sorted({35, 40, max(measured, key=lambda step: measured[step])})


def test_a_gated_adapter_gives_what_the_run_measured_and_leaves_the_base_alone(runs: Runs) -> None:
    adapter = load_adapter(runs.whole / "adapter", open_source(MODEL).config)
    assert (adapter.config.rank, adapter.config.mask_token_id) == (4, 90)
    settings: dict[str, Any] = {"documents": 20, "length": 64, "batch_size": 4, "dtype": "float32", "mask_token": "90"}
    report, base = evaluate_store(
        str(MODEL), str(runs.store), adapter=str(runs.whole / "adapter"), base=str(MODEL), **settings
    )
    assert base is not None and base.clean_loss == report.clean_loss
    first, last = (entry for entry in numbers(runs.whole) if "acceptance" in entry)
    assert first["held_out_clean_loss"] == last["held_out_clean_loss"] == pytest.approx(base.clean_loss, rel=1e-6)
    for name, expected in acceptance_values(report).items():
        assert last[name] == pytest.approx(expected, rel=1e-5), name
    assert base.temperatures[0].by_depth != report.temperatures[0].by_depth


@pytest.mark.parametrize("attempt", [0, 1, *(pytest.param(number, marks=pytest.mark.slow) for number in range(2, 20))])
def test_a_run_killed_anywhere_and_resumed_has_the_losses_of_an_unbroken_one(
    runs: Runs, tmp_path: Path, attempt: int
) -> None:
    seed = time.time_ns()
    chance = random.Random(seed)
    output = tmp_path / "killed"
    # Every other kill comes in the middle of a save.
    kill_in_save, least_steps, delay = attempt % 2 == 1, chance.randrange(1, STEPS - 5), chance.uniform(0, 0.05)
    process = start(runs.environment, runs.settings, "--output", output)
    while process.poll() is None:
        if _lines(output) >= least_steps and (not kill_in_save or _is_saving(output)):
            time.sleep(delay)
            break
        time.sleep(0.001)
    process.kill()
    _, error = process.communicate()
    saved = checkpoints(output)
    found = f"{_lines(output)} steps, checkpoints {saved}, {'in' if _is_saving(output) else 'not in'} a save"
    print(f"seed {seed}: killed with {found}, exit code {process.returncode}")
    assert process.returncode == -signal.SIGKILL, error
    resumed = start(runs.environment, runs.settings, "--output", output, *(["--resume"] if saved else []))
    _, error = resumed.communicate()
    assert resumed.returncode == 0, error
    assert "Traceback" not in error and "Exception" not in error
    assert numbers(output) == numbers(runs.whole)
    assert_same_adapter(output, runs.whole)


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _is_saving(output: Path) -> bool:
    return any((output / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def assert_same_adapter(output: Path, other: Path) -> None:
    for name in ("adapter_model.safetensors", "mask_embedding.safetensors"):
        assert (output / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = runs.copy_of_whole(tmp_path / "run")
    largest = max((output / "checkpoints" / str(STEPS)).rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    assert runs.train(output, resume=True).step == STEPS
    assert f"checkpoint {STEPS} is damaged" in capsys.readouterr().err
    assert numbers(output) == numbers(runs.whole)
    assert_same_adapter(output, runs.whole)


def test_a_run_whose_result_is_missing_writes_it_when_resumed(runs: Runs, tmp_path: Path) -> None:
    output = runs.copy_of_whole(tmp_path / "run")
    shutil.rmtree(output / "adapter")
    assert runs.train(output, resume=True).result == output / "adapter"
    assert_same_adapter(output, runs.whole)
    with pytest.raises(UserError, match=rf"trained to its last step \({STEPS}\); raise the steps"):
        runs.train(output, resume=True)


def test_a_finished_run_goes_on_when_it_gets_more_steps(runs: Runs, tmp_path: Path) -> None:
    output = runs.copy_of_whole(tmp_path / "run")
    assert runs.train(output, "stages.2.steps=28", resume=True).step == STEPS + 3
    assert numbers(output)[:STEPS] == numbers(runs.whole)
    assert [entry["step"] for entry in numbers(output)[STEPS:]] == [41, 42, 43]
    assert load_train_config(output / "config.yaml").steps == STEPS + 3
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() != (
        runs.whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_loss_that_is_no_number_stops_the_run_with_the_inputs_of_the_step(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert stopped_at(runs, output, 2).step == 3
    with pytest.raises(UserError, match=r"step 5: the loss .* not a finite number; .*bad_step_5.*; go on from step 3"):
        runs.train(output, HUGE, resume=True)
    with np.load(output / "bad_step_5.process_0.npz") as saved:
        assert (saved["step"], saved["seed"]) == (4, 0)
        data = Data.open(Setup.from_config(runs.config(output))).training()
        expected = [next(data) for _ in range(5)][4]
        assert all(np.array_equal(saved[name], expected[name]) for name in expected)
        data.close()
    assert checkpoints(output) == [3]
    assert runs.train(output, resume=True).reason == "finished"
    assert numbers(output) == numbers(runs.whole)


def test_without_a_checkpoint_the_advice_is_to_start_again_and_that_works(runs: Runs, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(UserError, match=r"step 2: .*; start again with a lower"):
        runs.train(output, HUGE)
    with pytest.raises(UserError, match="holds no checkpoint to go on from"):
        runs.train(output, resume=True)
    assert stopped_at(runs, output, 2).step == 3


def test_a_loss_that_runs_away_stops_the_run_at_the_step_that_the_rule_says(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothed, excess = [], []
    for entry in numbers(runs.whole)[:5]:
        smoothed.append(0.9 * smoothed[-1] + 0.1 * entry["loss"] if smoothed else entry["loss"])
        excess.append(smoothed[-1] / min(smoothed))
    factor = (1 + max(excess)) / 2
    bad = next(step for step, ratio in enumerate(excess, 1) if ratio > factor)
    monkeypatch.setattr(loop, "_SETTLE", 0)
    with pytest.raises(UserError, match=rf"step {bad}: the smoothed loss is .*, its lowest was "):
        runs.train(tmp_path / "run", f"divergence={factor}")
    assert (tmp_path / "run" / f"bad_step_{bad}.process_0.npz").is_file()


def test_inputs_that_cannot_be_written_are_told_in_the_same_line(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_file", fail)
    with pytest.raises(
        UserError, match=r"step 2: .*inputs could not be written \(No space left on device\); start again"
    ):
        runs.train(tmp_path / "run", HUGE)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, also where the tests run in the background and it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_raises_at_once_and_saves_nothing(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 3, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        runs.train(tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_full_disk_while_saving_costs_a_checkpoint_and_not_the_run(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Checkpoints.save

    def save_on_a_full_disk(self: Checkpoints, step: int, *arguments: Any, **options: Any) -> None:
        if step != 10:
            return save(self, step, *arguments, **options)
        self.wait()
        with files_limited_to(1000):
            save(self, step, *arguments, **{**options, "wait": True})

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    output = tmp_path / "run"
    stopped_at(runs, output, 12)
    assert "checkpoint 10 could not be saved" in capsys.readouterr().err
    assert checkpoints(output) == [5, 13]
    assert numbers(output) == numbers(runs.whole)[:13]


def test_curves_that_cannot_be_drawn_do_not_cost_the_result(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(output: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "plot", fail)
    output = runs.copy_of_whole(tmp_path / "run")
    shutil.rmtree(output / "adapter")
    assert runs.train(output, resume=True).reason == "finished"
    assert_same_adapter(output, runs.whole)
    assert capsys.readouterr().err.endswith("cannot draw the curves of " + f"{output} (No space left on device)\n")


def test_out_of_memory_is_a_line_with_advice(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr(loop._Run, "_steps", fail)
    with pytest.raises(UserError, match="no memory left: train with a smaller batch_size"):
        runs.train(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapter.rank=2", "adapter.rank is 4 there, here 2"),
        ("mode=lora", "mode is gated-lora there, here lora"),
        ("mask_token=91", "model.mask_token_id is 90 there, here 91"),
        ("seed=1", "data.seed is 0 there, here 1"),
        ("length=100", "data.length is 64 there, here 100"),
        ('freeze=["adapter.layers.mlp.*"]', "freeze is "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(runs: Runs, tmp_path: Path, change: str, message: str) -> None:
    output = runs.copy_of_whole(tmp_path / "run")
    with pytest.raises(UserError, match=rf"checkpoints/{STEPS} is a checkpoint of another run: {message}"):
        runs.train(output, change, resume=True)


def test_full_mode_writes_a_model_of_its_own_that_keeps_what_is_frozen(runs: Runs, tmp_path: Path) -> None:
    """Also: a run on the base cannot be resumed on that model."""
    output = tmp_path / "full"
    path = write_settings(
        tmp_path / "full.yaml",
        runs.store,
        output,
        mode="full",
        adapter=None,
        stages=[{"steps": 4, "starts": "aligned"}],
        freeze=["layers.mlp.*", "norm.*"],
        evaluation={"documents": 0},
    )
    outcome = loop.train(load_train_config(path))
    assert outcome == Outcome(4, "finished", output / "model", None)
    assert all(entry["clean_rows"] and entry["loss_clean"] for entry in numbers(output))
    base, trained = open_source(MODEL), open_source(output / "model")
    assert trained.config.mask_token_id == 90
    for weight in weight_table(base.config):
        same = np.array_equal(base.read(weight), trained.read(weight))
        assert same == (".mlp." in weight.path or weight.path == "norm.scale"), weight.path
    tokens = jnp.arange(12)[None]
    base_logits, logits = (
        causal_logits(Qwen3(base.config, load_params(source, jnp.dtype(jnp.float32))), tokens)
        for source in (base, trained)
    )
    assert bool(jnp.isfinite(logits).all()) and float(jnp.abs(logits - base_logits).max()) > 0.1

    resumed = runs.copy_of_whole(tmp_path / "run")
    with pytest.raises(UserError, match=r"base_weights is \d+ there, here \d+"):
        runs.train(resumed, f"model={output / 'model'}", resume=True)


@pytest.mark.parametrize(("mode", "result"), [("ar", "model"), ("lora", "adapter")])
def test_the_other_modes_run_to_their_end(runs: Runs, tmp_path: Path, mode: str, result: str) -> None:
    path = write_settings(
        tmp_path / "settings.yaml",
        runs.store,
        tmp_path / "run",
        mode=mode,
        adapter={"rank": 4} if mode == "lora" else None,
        mask_token="90" if mode == "lora" else None,
        stages=[{"steps": 3}],
    )
    outcome = loop.train(load_train_config(path))
    assert (outcome.reason, outcome.result) == ("finished", tmp_path / "run" / result)
    entries = numbers(tmp_path / "run")
    assert all(entry["loss_clean"] > 0 for entry in entries)
    assert all(("loss_noisy" in entry) == (mode == "lora") for entry in entries)
    assert (outcome.acceptance is None) == (mode == "ar") == ("acceptance" not in entries[-1])


def test_no_thread_that_reads_data_outlives_a_run(runs: Runs, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    stopped_at(runs, tmp_path / "run", 2)
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("grain"):
            # Told to stop, but not waited for.
            thread.join(60)
            assert not thread.is_alive()
