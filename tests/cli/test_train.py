"""`idlm train`: exit codes, signals, --dry-run, and one line for what the user can mend."""

import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from idlm_jax.cli import main as cli
from idlm_jax.training import setup
from idlm_jax.training.metrics import RunLog
from tests.cli.decoding_support import refused, run
from tests.support import GOLDEN
from tests.training.runs import (
    STEPS,
    checkpoints,
    make_store,
    numbers,
    shared_compilations,
    start,
    write_settings,
)


@dataclass(frozen=True)
class Given:
    """What the runs here start from."""

    folder: Path
    settings: Path
    store: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("train")
    store = make_store(folder / "store")
    settings = write_settings(folder / "settings.yaml", store, folder / "unused")
    with shared_compilations(tmp_path_factory) as environment:
        yield Given(folder, settings, store, environment)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "idlm train runs/gated/config.yaml --resume" in capsys.readouterr().out


def test_a_run_that_a_signal_ended_can_be_resumed_to_the_same_end(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog.log
    for number, step, code in ((signal.SIGTERM, 2, 143), (signal.SIGINT, 17, 130)):
        output = tmp_path / number.name

        def log_and_raise(self: RunLog, done: int, values: Any, last: int = step, number: int = number) -> None:
            log(self, done, values)
            if done == last:
                signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "log", log_and_raise)
            assert run(capsys, "train", given.settings, "--output", output)[0] == code
        assert checkpoints(output)[-1] == step + 1
        assert refused(capsys, "train", given.settings, "--output", output).endswith(
            "holds a run already; go on with it (--resume) or give another --output\n"
        )
        # From the configuration in the output directory, as the help says.
        code, out, _ = run(capsys, "train", output / "config.yaml", "--resume")
        assert code == 0
        assert f"{STEPS} steps done; written: {output / 'adapter'}" in out and "acceptance by depth" in out
        assert refused(capsys, "train", output / "config.yaml", "--resume").endswith("raise the steps to go on\n")
    assert numbers(tmp_path / "SIGTERM") == numbers(tmp_path / "SIGINT")
    assert len(numbers(tmp_path / "SIGINT")) == STEPS


# A disk on which a save does not end.
HANGING = """
import time
from idlm_jax.training.checkpoints import Checkpoints
Checkpoints._seal = lambda *_: time.sleep(3600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_does_not_wait_for_a_save(given: Given, tmp_path: Path, number: int, code: int) -> None:
    process = start(given.environment, given.settings, "--output", tmp_path / "run", program=HANGING)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            # The first save begins after step 5, and whatever comes next waits for it.
            if line.startswith("step 5"):
                process.send_signal(number)
            if "once more to stop at once" in line:
                break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(number)
        # Far less than the save takes.
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in rest


def test_a_loss_that_is_no_number_ends_with_one_line(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    code, _, err = run(capsys, "train", given.settings, "--output", output, "--set", "optimizer.learning_rate=1e38")
    assert code == 2 and "Traceback" not in err
    assert re.fullmatch(r"idlm: error: step 2: the loss .* start again with a lower .*", err.splitlines()[-1])
    assert (output / "bad_step_2.process_0.npz").is_file()


def test_a_dry_run_prints_what_a_run_would_take_and_touches_nothing(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "load_params", lambda *_: pytest.fail("weights are loaded"))
    arguments = ["--dry-run", "--output", tmp_path / "run", "--data", tmp_path / "nothing", "--set", "accumulation=2"]
    code, out, _ = run(capsys, "train", given.settings, *arguments)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "mesh: data 1 × fsdp 1 × tp 1, 2 parts a step (1 × cpu)" in out
    # The stage with the most masks: 64 / 3 groups of 3, rounded up to 24 of them, in each of 4 rows.
    assert "a step: 4 rows × 64 = 256 tokens, 256 masks" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "adapter.layers.mlp.down_proj.a 2×64×4 float32 2.0 kB trained" in lines
    assert "embed_tokens.embedding 280×32 float32 35.8 kB frozen" in lines
    sizes = {name: size for name, size in re.findall(r"^ *(\w[\w ]+?) {2,}([\d.]+ [kMG]?B) *$", out, re.MULTILINE)}
    # Float32 weights of the adapter: rank 4 on 7 projections of 2 layers, and the embedding of the mask.
    trained = 4 * (2 * 4 * (32 + 64 + 2 * (32 + 32) + 64 + 32 + 3 * (32 + 64)) + 32)
    assert sizes["trained weights"] == f"{trained / 1000:.1f} kB"
    assert sizes["optimizer"] == f"{(2 * trained + 8) / 1000:.1f} kB"
    assert {"frozen weights", "gradients and activations", "total"} <= sizes.keys()


def test_data_that_does_not_fit_is_one_line_before_anything_is_written(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = make_store(tmp_path / "foreign", tokenizer="0" * 64)
    long = make_store(tmp_path / "long", longest=65)
    masked = make_store(tmp_path / "masked", prompt=None)
    output = tmp_path / "run"
    for store, message in (
        (tmp_path / "stroe", "no token store here"),
        (foreign, "tokenizer"),
        (long, "a document of 65 tokens does not fit a row of 64"),
        (masked, "no token is a target"),
    ):
        assert message in refused(capsys, "train", given.settings, "--output", output, "--data", store)
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lenght=64"], "unknown key 'lenght'; did you mean 'length'?"),
        (["mode=gated_lora"], "mode: unknown 'gated_lora' (one of ar, full, lora, gated-lora); did you mean"),
        (["length=129"], "length 129 exceeds the model's context of 128"),
        (["mask_token=null"], "names no mask token: set 'mask_token'"),
        (["batch_size=4", "accumulation=3"], "4 rows cannot be cut into 3 equal parts"),
        (["mesh.data=3"], "mesh: data 3 × fsdp 1 × tp 1 is not 1, the number of devices"),
        (["evaluation.documents=80"], "cannot hold out 80 of the 80 documents"),
        (
            ['freeze=["adapter.layer.mlp.*"]'],
            "freeze: 'adapter.layer.mlp.*' matches no trained weight; did you mean 'adapter.layers.mlp.",
        ),
        (['freeze=["*"]'], "freeze: nothing is left to train"),
        (["model=nowhere/model.gguf"], "nowhere/model.gguf: no such file"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_written(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    overrides = [part for change in changes for part in ("--set", change)]
    output = tmp_path / "run"
    assert message in refused(capsys, "train", given.settings, "--output", output, *overrides)
    assert not output.exists()


def test_meshes_that_do_not_fit_are_one_line(given: Given, tmp_path: Path) -> None:
    environment = {**given.environment, "JAX_NUM_CPU_DEVICES": "8"}
    program = f"""
settings = {str(given.settings)!r}
for changes in ["mesh.tp=4"], ["mesh.data=2"]:
    sets = [part for change in changes for part in ("--set", change)]
    assert main(["train", settings, "--output", {str(tmp_path / "run")!r}, *sets]) == 2
"""
    process = start(environment, given.settings, "--output", tmp_path / "run", program=program)
    _, error = process.communicate()
    # A slow machine is told what it waits for.
    lines = [line for line in error.splitlines() if not line.endswith("…")]
    assert lines == [
        "idlm: error: mesh.tp: 4 does not divide the model's 2 key heads",
        *2 * ["idlm: error: batch_size: 4 rows cannot be split over 8 devices (mesh data × fsdp)"],
    ]


def test_places_that_hold_no_run_or_cannot_be_written_are_one_line(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no checkpoint to go on from; leave out --resume" in refused(
        capsys, "train", given.settings, "--output", tmp_path / "run", "--resume"
    )
    (tmp_path / "file").write_text("")
    assert "cannot write to " in refused(capsys, "train", given.settings, "--output", tmp_path / "file" / "run")
    (tmp_path / "done" / "adapter").mkdir(parents=True)
    assert "holds a run already" in refused(capsys, "train", given.settings, "--output", tmp_path / "done")


def test_models_of_another_tokenizer_are_one_line(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", tmp_path / "run", "--model", GOLDEN / "qwen3_tied", "--set", "length=32"]
    assert "tokenizer" in refused(capsys, "train", given.settings, *arguments)
