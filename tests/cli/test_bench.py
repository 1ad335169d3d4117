"""`idlm bench analyse`: what it prints and writes, and one line for what the user can mend."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from idlm_jax.cli import main as cli
from tests.cli.decoding_support import refused, run

ROOT = Path(__file__).parents[2]
MODEL, EXAMPLE = ROOT / "configs" / "models" / "qwen3-8b.yaml", ROOT / "docs" / "efficiency"
REPORT, COSTS = EXAMPLE / "smollm2_n4.json", EXAMPLE / "h100_qwen3-8b.jsonl"
DEVICE = ("--bandwidth", 2.6, "--peak", 700)


def analyse(*more: object) -> list[object]:
    return ["bench", "analyse", MODEL, *more]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "analyse", "--help"])
    assert "idlm bench analyse " in capsys.readouterr().out


def test_tables_and_json_have_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    given = analyse("--report", REPORT, "--costs", COSTS, "--batch", 1, 64)
    code, out, _ = run(capsys, *given)
    assert code == 0 and "context 1024" in out
    code, out_json, _ = run(capsys, *given, "--json")
    values = json.loads(out_json)
    table = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    for way in values["ways"]:
        speeds = [p for p in values["points"] if (p["stride"], p["layout"]) == (way["stride"], way["layout"])]
        (row,) = [line for line in table if line[:2] == [str(way["stride"]), way["layout"]]]
        numbers = [way["tokens_per_forward"], way["overhead"], way["efficiency"], *(p["speed_up"] for p in speeds)]
        assert [cell.removeprefix("≈") for cell in row[3:]] == [f"{number:.2f}" for number in numbers]
    # The table of docs/measurements.md: two processes each.
    assert {(s["batch"], s["rows"]): s["measured"] for s in values["steps"] if not s["rank"]} == {
        (1, 7): pytest.approx(0.00612),
        (1, 16): pytest.approx(0.006235),
        (32, 7): pytest.approx(0.00982),
        (64, 7): pytest.approx(0.016785),
    }


def test_the_context_is_the_cost_tables_unless_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) | {"context": 2048, "byte_floor": 0.00593} for line in COSTS.read_text().splitlines()[:1]]
    costs = tmp_path / "costs.jsonl"
    costs.write_text("".join(json.dumps(line) for line in lines))
    for more, context in (((), 2048), (("--context", 512), 512)):
        _, out, _ = run(capsys, *analyse("--acceptance", 0.9, "--costs", costs, "--json", *more))
        assert json.loads(out)["context"] == context


def test_a_model_keeps_the_dots_of_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "Qwen3-0.5B" / "tiny-0.1.yaml"
    config.parent.mkdir()
    config.write_text(MODEL.read_text())
    _, out, _ = run(capsys, "bench", "analyse", config, "--acceptance", 0.9, *DEVICE, "--json")
    assert json.loads(out)["model"] == "tiny-0.1"


def test_two_numbers_of_a_device_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *analyse("--acceptance", 0.9, 0.9, 0.9, *DEVICE))
    assert code == 0 and "No step was measured" in out
    assert re.search(r"4\s+standard\s+7\s+2\.92\s+2\.40\s+1\.22", out)


def test_a_report_on_disk_has_tables_numbers_and_two_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = []
    for chance in (0.5, 0.9):
        given = (
            "--acceptance",
            chance,
            chance,
            "--costs",
            COSTS,
            "--batch",
            1,
            32,
            "--output",
            tmp_path / "new" / "out",
        )
        code, out_json, _ = run(capsys, *analyse(*given, "--json"))
        assert code == 0
        files = {file.name: file for file in (tmp_path / "new" / "out").iterdir()}
        assert set(files) == {"analysis.md", "analysis.json", "throughput.png", "steps.png"}
        assert json.loads(files["analysis.json"].read_text()) == json.loads(out_json)
        assert "| 2 | standard | 3 |" in files["analysis.md"].read_text()
        pictures.append([imread(files[name]) for name in ("throughput.png", "steps.png")])
    for before, after in zip(*pictures, strict=True):
        assert min(before.shape[:2]) > 400 and before.std() > 0.02
        assert before.shape != after.shape or (before != after).any()


def test_without_measured_steps_the_pictures_are_drawn_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(capsys, *analyse("--acceptance", 0, "--batch", 4, *DEVICE, "--output", tmp_path))
    assert (
        code == 0 and imread(tmp_path / "steps.png").std() > 0.02 and imread(tmp_path / "throughput.png").std() > 0.02
    )


def test_what_cannot_be_analysed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ("--acceptance", 0.9)
    assert "give either --acceptance" in refused(capsys, *analyse(*DEVICE))
    assert "give either --acceptance" in refused(capsys, *analyse(*some, "--report", REPORT, *DEVICE))
    assert "--acceptance has none" in refused(capsys, *analyse(*some, "--temperature", 1, *DEVICE))
    assert "acceptance is a share between 0 and 1, not 90.0" in refused(capsys, *analyse("--acceptance", 90, *DEVICE))
    assert "has no temperature 0.5" in refused(capsys, *analyse("--report", REPORT, "--temperature", 0.5, *DEVICE))
    assert "give --costs FILE.jsonl, or --bandwidth" in refused(capsys, *analyse(*some))
    assert "give --costs FILE.jsonl, or --bandwidth" in refused(capsys, *analyse(*some, "--peak", 700))
    assert "must be positive" in refused(capsys, *analyse(*some, "--peak", "nan", "--bandwidth", 2))
    assert "give either" in refused(capsys, *analyse(*some, "--costs", COSTS, "--peak", 700))
    assert "--batch needs sizes of at least 1" in refused(capsys, *analyse(*some, *DEVICE, "--batch", 4, 0))
    assert "--context must be at least 0" in refused(capsys, *analyse(*some, *DEVICE, "--context", -1))
    assert "--adapter-rank must be at least 0" in refused(capsys, *analyse(*some, *DEVICE, "--adapter-rank", -1))
    smaller = ["bench", "analyse", MODEL.with_name("qwen3-0.6b.yaml"), *some, "--costs", COSTS]
    assert "the cost table is of another model" in refused(capsys, *smaller)
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, *analyse(*some, *DEVICE, "--output", tmp_path / "file"))
    assert "did you mean 'analyse'?" in refused(capsys, "bench", "analyze")


def test_missing_matplotlib_matters_for_pictures_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    given = analyse("--acceptance", 0.9, *DEVICE)
    assert run(capsys, *given)[0] == 0
    message = refused(capsys, *given, "--output", tmp_path / "out")
    assert "needs matplotlib: pip install 'idlm-jax[train]'" in message and not (tmp_path / "out").exists()
