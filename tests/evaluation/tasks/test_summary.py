"""The summary: counts and intervals from the answers on disk, as Markdown, JSON and a picture."""

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks.summary import Score, summarize, write_summary


@pytest.mark.parametrize(("right", "total"), [(0, 1), (0, 40), (1, 40), (13, 40), (40, 40), (500, 1319)])
def test_intervals_are_those_of_wilson(right: int, total: int) -> None:
    wanted = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert Score(right, total).interval == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def write_cell(
    output: Path, mode: str, temperature: float = 0.0, coupling: str = "gumbel", texts: str = "abcd"
) -> None:
    """Four answers in two batches; those of "a" and "b" are right, "b" was cut."""
    name = f"gsm8k_{mode}_t{temperature:g}"
    cell = {"task": "gsm8k", "mode": mode, "temperature": temperature, "items": 5, "prompts_sha256": "0", "seed": 3}
    (output / "samples").mkdir(parents=True, exist_ok=True)
    (output / "samples" / f"{name}.json").write_text(json.dumps(cell | {"coupling": coupling, "adapter": "x"}))
    lines = [
        {
            "id": str(i),
            "text": text,
            "scores": {"flexible": text in "ab", "strict": False},
            "finish_reason": "length" if text == "b" else "stop",
            "tokens": 10 + i,
            "forwards": 4 + i,
            "batch": i // 2,
            "batch_seconds": 2.0 + i // 2,
        }
        for i, text in enumerate(texts)
    ]
    (output / "samples" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rows_hold_the_sums_over_answers_and_the_seconds_of_batches(tmp_path: Path) -> None:
    write_cell(tmp_path, "r-isd", texts="abxd")
    write_cell(tmp_path, "ar")
    shared, (ar, ours) = summarize(tmp_path)
    assert (ar.mode, ours.mode) == ("ar", "r-isd") and shared["seed"] == 3 and "mode" not in shared
    assert (ours.scores["flexible"], ours.scores["strict"]) == (Score(2, 4), Score(0, 4))
    assert (ours.tokens, ours.forwards, ours.seconds, ours.cut) == (46, 22, 5.0, 1)
    assert ours.tokens_per_forward == 46 / 22 and ours.tokens_per_second == 46 / 5
    assert ours.same == Score(3, 4) and ar.same is None
    assert ours.cells()[:4] == ["gsm8k", "greedy", "r-isd", "4 of 5"] and ours.cells()[-1] == "3/4"


def test_texts_are_compared_with_the_right_mode_and_only_where_they_must_agree(tmp_path: Path) -> None:
    for mode, texts in {"ar": "abcd", "isd": "wxyd", "adapted-ar": "wxyz"}.items():
        write_cell(tmp_path, mode, texts=texts)
        write_cell(tmp_path, mode, 1.0, "ratio", texts)
    _, rows = summarize(tmp_path)
    same = {(row.mode, row.temperature): row.same for row in rows}
    assert same.pop(("isd", 0.0)) == Score(3, 4)
    assert set(same.values()) == {None}


def test_without_a_reference_nothing_is_compared_and_without_answers_nothing_summed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no answers"):
        summarize(tmp_path)
    write_cell(tmp_path, "r-isd")
    write_cell(tmp_path, "ar", texts="")
    _, (row,) = summarize(tmp_path)
    assert row.mode == "r-isd" and row.same is None


def test_three_files_say_the_same(tmp_path: Path) -> None:
    for temperature in (0.0, 1.0):
        for mode in ("ar", "r-isd"):
            write_cell(tmp_path, mode, temperature)
    rows = write_summary(tmp_path)
    about, _, *table = (tmp_path / "summary.md").read_text().splitlines()
    assert "seed 3" in about and len(table) == 2 + len(rows) == 6
    assert [cell.strip() for cell in table[3].strip("|").split("|")] == rows[1].cells()
    values = json.loads((tmp_path / "summary.json").read_text())
    assert values["rows"][1]["scores"]["flexible"]["interval"] == list(rows[1].scores["flexible"].interval)
    assert (tmp_path / "summary.png").read_bytes()[:4] == b"\x89PNG"
