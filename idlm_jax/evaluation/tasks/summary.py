"""What the answers of a directory come to: scores with intervals, tokens a forward and speed, by task and mode."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks.item import import_extra
from idlm_jax.evaluation.tasks.run import MODES, SAMPLES, TASKS, cell_name, read_samples
from idlm_jax.plots import AMBER, BLUE, ORANGE, SKY, new_figure, tidy, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "summary"
HEADER = ("task", "temperature", "mode", "questions", "score (95 % interval)", "TPF", "tokens/s", "cut", "same text")
_COLORS = {"ar": BLUE, "r-isd": ORANGE, "isd": AMBER, "adapted-ar": SKY}


@dataclass(frozen=True)
class Score:
    """How many answers were right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Of the answers."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which also holds for few answers and for shares near 0 or 1."""
        z, n, p = NormalDist().inv_cdf(0.975), self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Row:
    """One cell: a task, mode and temperature."""

    task: str
    mode: str
    temperature: float
    # Questions of the cell; fewer are answered if the run was interrupted.
    questions: int
    scores: Mapping[str, Score]
    tokens: int
    forwards: int
    # Decoding, without prefill and compilation.
    seconds: float
    # Answers that ended at max_tokens.
    cut: int
    # Of the answers to the same questions, how many texts are the reference mode's; None where they need not be.
    same: Score | None

    @property
    def tokens_per_forward(self) -> float:
        """TPF (method.md 6.2)."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of whole batches."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def answered(self) -> int:
        """How many questions have an answer."""
        return next(iter(self.scores.values())).total

    def cells(self) -> list[str]:
        """As texts below HEADER."""
        return [
            self.task,
            f"{self.temperature:g}" if self.temperature else "greedy",
            self.mode,
            str(self.questions) if self.answered == self.questions else f"{self.answered} of {self.questions}",
            "; ".join(f"{name} {_percent(score)}" for name, score in self.scores.items()),
            f"{self.tokens_per_forward:.2f}",
            f"{self.tokens_per_second:.1f}",
            f"{self.cut / self.answered:.0%}",
            "-" if self.same is None else f"{self.same.right}/{self.same.total}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            "task": self.task,
            "mode": self.mode,
            "temperature": self.temperature,
            "questions": self.questions,
            "answered": self.answered,
            "scores": {
                name: {"right": score.right, "share": score.share, "interval": list(score.interval)}
                for name, score in self.scores.items()
            },
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "cut": self.cut,
            "same_as_reference": None if self.same is None else {"same": self.same.right, "of": self.same.total},
        }


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def summarize(output: Path) -> tuple[dict[str, Any], list[Row]]:
    """What all cells of a directory share, and a row for each that has answers; raises UserError if none has."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (output / SAMPLES).glob("*.json")]
    cells.sort(key=lambda cell: ([*TASKS].index(cell["task"]), cell["temperature"], [*MODES].index(cell["mode"])))
    samples = {cell_name(cell): read_samples(output / SAMPLES / f"{cell_name(cell)}.jsonl") for cell in cells}
    rows = [_row(cell, samples) for cell in cells if samples[cell_name(cell)]]
    if not rows:
        raise UserError(f"{output} holds no answers")
    shared = {key: value for key, value in cells[0].items() if all(cell.get(key) == value for cell in cells)}
    return shared, rows


def reference_of(cell: Mapping[str, Any]) -> str | None:
    """The mode whose very texts the answers of a cell should be."""
    return MODES[cell["mode"]].reference if cell["adapter"] else "ar" if cell["mode"] == "isd" else None


def _row(cell: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Row:
    answers = samples[cell_name(cell)]
    theirs = {line["id"]: line["text"] for line in samples.get(cell_name({**cell, "mode": reference_of(cell)}), ())}
    pairs = [(line["text"], theirs[line["id"]]) for line in answers if line["id"] in theirs]
    must_agree = cell["temperature"] == 0 or cell["coupling"] == "gumbel"
    return Row(
        task=cell["task"],
        mode=cell["mode"],
        temperature=cell["temperature"],
        questions=cell["items"],
        scores={
            name: Score(sum(line["scores"][name] for line in answers), len(answers)) for name in answers[0]["scores"]
        },
        tokens=sum(line["tokens"] for line in answers),
        forwards=sum(line["forwards"] for line in answers),
        seconds=sum({line["batch"]: line["batch_seconds"] for line in answers}.values()),
        cut=sum(line["finish_reason"] == "length" for line in answers),
        same=Score(sum(ours == other for ours, other in pairs), len(pairs)) if pairs and must_agree else None,
    )


def write_summary(output: Path) -> list[Row]:
    """Write summary.md, .json and .png from all answers of a directory; returns the rows. Raises UserError."""
    import_extra("matplotlib", "the summary")
    shared, rows = summarize(output)
    about = ", ".join(f"{key} {value}" for key, value in shared.items())
    table = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    write_file(output / f"{FILE}.md", f"{about}\n\n" + "\n".join(lines) + "\n")
    values = {"settings": shared, "rows": [row.to_dict() for row in rows]}
    write_file(output / f"{FILE}.json", json.dumps(values, indent=2) + "\n")
    write_file(output / f"{FILE}.png", plot(rows))
    return rows


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: for every task its first score with its interval, and the tokens a forward, mode beside mode."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = new_figure(9, 2.4 * len(tasks) + 0.5)
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (score_axis, speed_axis), task in zip(axes, tasks, strict=True):
        _draw_task(score_axis, speed_axis, [row for row in rows if row.task == task])
    handles = {label: bar for axis in axes.flat for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    return to_png(figure)


def _draw_task(score_axis: "Axes", speed_axis: "Axes", rows: Sequence[Row]) -> None:
    temperatures = sorted({row.temperature for row in rows})
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    width = 0.8 / len(modes)
    for row in rows:
        place = temperatures.index(row.temperature) + (modes.index(row.mode) - (len(modes) - 1) / 2) * width
        name, score = next(iter(row.scores.items()))
        low, high = score.interval
        errors = [[100 * (score.share - low)], [100 * (high - score.share)]]
        style: dict[str, Any] = {"width": 0.9 * width, "color": _COLORS[row.mode], "label": row.mode}
        score_axis.bar(place, 100 * score.share, yerr=errors, capsize=3, **style)
        score_axis.set_ylabel(f"{name}, %")
        bars = speed_axis.bar(place, row.tokens_per_forward, **style)
        speed_axis.bar_label(bars, fmt="%.2f", fontsize="small")
    speed_axis.set_ylabel("tokens a forward")
    labels = [f"temperature {temperature:g}" if temperature else "greedy" for temperature in temperatures]
    for axis in (score_axis, speed_axis):
        axis.set_title(rows[0].task, loc="left")
        axis.set_xticks(range(len(labels)), labels)
        axis.margins(y=0.15)
        tidy(axis, grid="y")
