"""The command line around conversion: exit codes, messages, and what is left after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from idlm_jax.checkpoint.hf import find_tensors
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.cli import main as cli
from tests.checkpoint.hf_files import TINY, write_checkpoint
from tests.support import GOLDEN

ROOT = Path(__file__).parents[2]


def idlm(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    command = [sys.executable, "-m", "idlm_jax.cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The same inside this process: exit code, output, messages."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_verb_without_importing_jax() -> None:
    probe = "import sys; from idlm_jax.cli.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert all(f"  {verb} " in result.stdout for verb in cli.VERBS)


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("convert", "export", "info"):
        with pytest.raises(SystemExit) as done:
            cli.main([verb, "--help"])
        assert done.value.code == 0
        assert f"  idlm {verb} " in capsys.readouterr().out


def test_unknown_verb_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "convrt", "a", "b")
    assert (code, out) == (2, "")
    assert err.startswith("idlm: error: unknown verb 'convrt'; did you mean 'convert'?") and err.count("\n") == 1


def test_conversion_and_export_succeed_without_a_warning(tmp_path: Path) -> None:
    converted = idlm("convert", GOLDEN / "qwen3_sharded", tmp_path / "orbax")
    assert (converted.returncode, converted.stderr) == (0, "")
    assert converted.stdout.startswith(f"wrote {tmp_path / 'orbax'}")
    exported = idlm("export", tmp_path / "orbax", tmp_path / "hf", "--max-shard-size", "50KB")
    assert (exported.returncode, exported.stderr) == (0, "")
    before, after = find_tensors(GOLDEN / "qwen3_sharded"), find_tensors(tmp_path / "hf")
    assert all(before[name].equals(after[name]) for name in before)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = idlm("convert", tmp_path / "nowhere", tmp_path / "target")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("idlm: error: ") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", GOLDEN / "qwen3_tied", "TARGET", "--max-shard-size", "5 parsecs"],
            "is not a size; write for example",
        ),
        (["convert", GOLDEN / "qwen3_tied", "TARGET", "--mask-token", "96"], "outside the vocabulary"),
        (["convert", GOLDEN / "qwen3_tied", GOLDEN / "sdar"], "exists already"),
        (["info", GOLDEN / "qwen3_tied", "--batch", "0"], "must be at least 1"),
        (["info", GOLDEN / "qwen3_tied" / "model.safetensors"], "give the directory"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *(tmp_path / "target" if item == "TARGET" else item for item in arguments))
    assert (code, out) == (2, "")
    assert message in err and err.startswith("idlm: error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_verify_says_that_it_needs_torch_before_converting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "convert", GOLDEN / "qwen3_tied", tmp_path / "target", "--verify")
    assert code == 2 and "needs torch, which is not installed" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.torch
@pytest.mark.parametrize("source", ["qwen3_untied", "sdar", "llama_rope_yarn_mscale", "qwen3_bf16"])
def test_verify_agrees_with_transformers(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    code, out, _ = run(capsys, "convert", GOLDEN / source, tmp_path / "target", "--verify")
    assert code == 0 and "same argmax at 100.0%" in out


@pytest.mark.torch
def test_verify_fails_when_the_weights_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from idlm_jax.checkpoint import verify

    monkeypatch.setattr(
        verify, "load_params", lambda source, dtype: load_params(open_source(GOLDEN / "qwen3_rope_yarn"))
    )
    code, _, err = run(capsys, "convert", GOLDEN / "qwen3_tied", tmp_path / "target", "--verify")
    assert code == 1 and "the logits differ" in err


def test_killed_conversion_leaves_only_its_temporary_directory_and_can_be_repeated(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {**TINY, "num_hidden_layers": 8})
    slow = (
        "import sys, time; from idlm_jax.checkpoint import store; from idlm_jax.checkpoint.open import open_source;"
        "store.batches.__defaults__ = (1,)\n"
        "def wait(size): print('.', flush=True); time.sleep(9)\n"
        "store.write_orbax(open_source(sys.argv[1]), sys.argv[2], progress=wait)"
    )
    target = tmp_path / "target"
    process = subprocess.Popen([sys.executable, "-c", slow, source, target], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1) == b"."  # the first batch is on the disk
    process.kill()
    process.wait()
    left = sorted(set(os.listdir(tmp_path)) - {"source"})
    assert len(left) == 1 and left[0].startswith(".target.tmp-")
    assert idlm("convert", source, target).returncode == 0
    load_params(open_source(target))


def test_interrupted_conversion_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    slow = (
        "import signal, sys, time; from idlm_jax.cli import main, progress;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a suite run in the background inherits SIG_IGN
        "progress.Progress.__call__ = lambda self, size: (print('.', flush=True), time.sleep(30));"
        "sys.exit(main.main(['convert', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", slow, GOLDEN / "qwen3_tied", tmp_path / "target"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1) == b"."
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"idlm: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_closed_pipe_is_quiet() -> None:
    command = f"'{sys.executable}' -m idlm_jax.cli.main info configs/models/qwen3-32b.yaml --all --json | head -1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("{\n", "")


def info_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    code, out, _ = run(capsys, "info", *arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_info_counts_parameters_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    data = info_json(capsys, ROOT / "configs/models/qwen3-8b.yaml", "--batch", 2, "--length", 1000)
    assert data["kind"] == "configuration"
    assert data["parameters"] == 8_190_735_360 and data["weights_bytes"] == 2 * 8_190_735_360
    # keys and values × layers × heads × head_dim × bytes × tokens
    assert data["kv_cache"] == {"batch": 2, "length": 1000, "dtype": "bfloat16", "bytes": 2 * 36 * 8 * 128 * 2 * 2000}


def test_info_says_the_same_of_every_form_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(GOLDEN / "qwen3_bf16"), str(tmp_path / "orbax")]) == 0
    capsys.readouterr()
    forms = [GOLDEN / "qwen3_bf16", tmp_path / "orbax", GOLDEN / "qwen3_bf16" / "config.json"]
    infos = [info_json(capsys, form) for form in forms]
    assert [info["kind"] for info in infos] == ["huggingface", "orbax", "configuration"]
    for info in infos[1:]:
        assert {k: v for k, v in info.items() if k not in ("path", "kind")} == {
            k: v for k, v in infos[0].items() if k not in ("path", "kind")
        }


def test_info_folds_layers_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    folded = info_json(capsys, GOLDEN / "qwen3_untied")
    unfolded = info_json(capsys, GOLDEN / "qwen3_untied", "--all")
    layers = folded["config"]["num_hidden_layers"]
    q = next(row for row in folded["tensors"] if row["name"] == "layers.{i}.self_attn.q_proj.kernel")
    assert q["count"] == layers and q["axes"] == ["embed", "heads"]
    assert sum(row["count"] for row in folded["tensors"]) == len(unfolded["tensors"])
    assert sum(row["size"] for row in folded["tensors"]) == sum(row["size"] for row in unfolded["tensors"])


def test_info_table_shows_types_of_a_gguf_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", GOLDEN / "gguf" / "llama_q4_1.gguf")
    assert code == 0
    assert "Q4_1 → float32" in out and "KV cache" in out and "layers.{i}.mlp.down_proj.kernel" in out


@pytest.mark.slow
def test_memory_of_conversion_stays_under_its_limit_on_three_gigabytes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "measure_convert_memory.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, script, "--directory", tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
