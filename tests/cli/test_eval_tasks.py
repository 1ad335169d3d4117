"""`idlm eval tasks`: what it prints and writes, and one line for what the user can mend."""

import json
from pathlib import Path

import pytest

from idlm_jax.cli import main as cli
from tests.cli.decoding_support import TINY, Script, refused, run, write


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Of three prompts; an answer that says hello follows the first two."""
    pytest.importorskip("if_verifiable")
    words = ["hello", "and", "goodbye"]
    records = [
        {"prompt": f"Say {word}.", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": [word]}]}
        for word in words
    ]
    return write(tmp_path / "prompts.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def arguments(questions: Path, output: Path, *more: object) -> list[object]:
    task = f"ifeval={questions}"
    return ["eval", "tasks", TINY, "--mask-token", 270, "--tasks", task, "--output", output, "--max-tokens", 24, *more]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "tasks", "--help"])
    assert "idlm eval tasks models/smollm2" in capsys.readouterr().out


def test_modes_stand_side_by_side(
    script: Script, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments(questions, tmp_path / "run", "--temperatures", 0, 1, "--batch-size", 2))
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if "ifeval " in line]
    assert [line[:4] for line in lines] == [
        ["ifeval", temperature, mode, "3"] for temperature in ("greedy", "1") for mode in ("ar", "isd")
    ]
    assert all("prompt strict 66.7 % (20.8 to 93.9)" in " ".join(line) for line in lines)
    assert [line[-1] for line in lines] == ["-", "3/3", "-", "3/3"]
    assert {policy.stride for policy in script.policies} == {1, 4}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "samples", "summary.json", "summary.md", "summary.png"
    ]  # fmt: skip
    assert f"every answer is in {tmp_path / 'run' / 'samples'}" in out


def test_json_is_the_summary(
    script: Script, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--modes", "isd", "--stride", 2, "--layout", "standard", "--coupling", "ratio", "--limit", 2, "--json"]
    code, out, _ = run(capsys, *arguments(questions, tmp_path / "run", *more))
    (row,) = json.loads(out)
    assert code == 0 and (row["mode"], row["answered"]) == ("isd", 2)
    assert row["scores"]["prompt strict"]["right"] == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows"] == [row]
    assert {key: summary["settings"][key] for key in ("stride", "layout", "coupling")} == {
        "stride": 2, "layout": "standard", "coupling": "ratio"
    }  # fmt: skip


def test_ar_alone_needs_no_mask_token(
    script: Script, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = f"ifeval={questions}"
    more = ["--tasks", task, "--output", tmp_path / "run", "--modes", "ar", "--max-tokens", 24, "--json"]
    code, out, _ = run(capsys, "eval", "tasks", TINY, *more)
    assert code == 0 and [row["mode"] for row in json.loads(out)] == ["ar"]


def test_mistakes_are_one_line(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: object) -> str:
        message = refused(capsys, *arguments(questions, tmp_path / "run", *more))
        assert not (tmp_path / "run").exists()
        return message

    assert "unknown task 'gsm8'" in said("--tasks", "gsm8") and "did you mean 'gsm8k'?" in said("--tasks", "gsm8")
    assert "gsm8k needs its questions" in said("--tasks", "gsm8k")
    assert "cannot read nowhere.jsonl" in said("--tasks", "humaneval=nowhere.jsonl")
    assert "--limit must be at least 1" in said("--limit", 0)
    assert "give one with --adapter" in said("--modes", "r-isd")
    assert "did you mean 'branch'?" in said("--layout", "brunch")
    no_mask = ["eval", "tasks", TINY, "--tasks", f"ifeval={questions}", "--output", tmp_path / "run"]
    assert "names no mask token" in refused(capsys, *no_mask)


def test_an_interruption_leaves_answers_to_go_on_from(
    script: Script, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--batch-size", 1]
    script.interrupt = KeyboardInterrupt
    code, _, err = run(capsys, *arguments(questions, tmp_path / "run", *more))
    assert code == 130 and "the same command goes on" in err
    code, out, _ = run(capsys, *arguments(questions, tmp_path / "run", *more))
    assert code == 0 and "3/3" in out
