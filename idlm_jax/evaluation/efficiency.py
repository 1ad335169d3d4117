"""What strided decoding gains: tokens a forward from acceptance, seconds from step costs, by stride, layout and batch.

Terms are those of method.md 6.2 and 6.3. TPF tells how many passes are saved, query tokens a pass what they cost where
arithmetic is the bound; which of the two counts depends on the batch, so times of steps decide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

from idlm_jax.checkpoint.companions import read_json
from idlm_jax.decoding.config import MAX_STRIDE
from idlm_jax.decoding.window import LAYOUTS, window_rows
from idlm_jax.errors import UserError
from idlm_jax.evaluation.acceptance import Acceptance
from idlm_jax.evaluation.step_cost import Shape, StepCosts


@dataclass(frozen=True)
class Way:
    """A way to decode: AR, or a stride and a layout."""

    stride: int
    layout: str
    # W, query tokens a request and pass.
    rows: int
    tokens_per_forward: float

    @property
    def name(self) -> str:
        """As in tables and pictures."""
        return "AR" if self.stride == 1 else f"N = {self.stride}, {self.layout}"

    @property
    def overhead(self) -> float:
        """OH: query tokens processed for each that is emitted; AR's is 1."""
        return self.rows / self.tokens_per_forward

    @property
    def efficiency(self) -> float:
        """TPF / OH = TPF² / query size."""
        return self.tokens_per_forward / self.overhead


AR = Way(1, "", 1, 1.0)


@dataclass(frozen=True)
class Point:
    """One way to decode at one batch size."""

    way: Way
    batch: int
    # Of a step of this way and of AR.
    seconds: float
    ar_seconds: float
    # Which of the two were measured rather than predicted.
    step_measured: bool
    ar_measured: bool

    @property
    def measured(self) -> bool:
        """Whether nothing is predicted."""
        return self.step_measured and self.ar_measured

    @property
    def step_ratio(self) -> float:
        """Time of a step, AR's = 1."""
        return self.seconds / self.ar_seconds

    @property
    def speed_up(self) -> float:
        """Over AR at this batch size."""
        return self.way.tokens_per_forward / self.step_ratio

    @property
    def per_request(self) -> float:
        """Tokens/s of a request."""
        return self.way.tokens_per_forward / self.seconds

    @property
    def total(self) -> float:
        """Tokens/s of the batch."""
        return self.batch * self.per_request


@dataclass(frozen=True)
class Check:
    """A measured step beside what bytes and FLOPs say of it."""

    shape: Shape
    seconds: float
    floor: float
    predicted: float


@dataclass(frozen=True)
class Analysis:
    """All there is to say about one model, device and acceptance."""

    # What was given, in words.
    model: str
    acceptance: str
    costs: StepCosts
    context: int
    rank: int
    ways: tuple[Way, ...]
    # Batch by batch, in each AR first and then every way.
    points: tuple[Point, ...]
    checks: tuple[Check, ...]

    @property
    def title(self) -> str:
        """What was analysed, in a line."""
        adapter = f", gated LoRA of rank {self.rank}" if self.rank else ""
        return f"{self.model} on {self.costs.device.name}, context {self.context}{adapter}"

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, ascending."""
        return tuple(dict.fromkeys(point.batch for point in self.points))

    def of_batch(self, batch: int) -> list[Point]:
        """All ways at one batch size."""
        return [point for point in self.points if point.batch == batch]

    def of_way(self, way: Way) -> list[Point]:
        """One way at all batch sizes."""
        return [point for point in self.points if point.way == way]

    def best(self, batch: int) -> Point:
        """The fastest way at one batch size."""
        return max(self.of_batch(batch), key=lambda point: point.total)


def by_depth(values: Sequence[float]) -> Acceptance:
    """Acceptance from a value a depth, as if the drafts of a pass were independent; raises UserError for other values.

    A report is better: drafts of one pass are accepted or rejected together more often than that.
    """
    _check_chances(values, "--acceptance")
    return Acceptance(math.nan, tuple(values), tuple(accumulate(values, mul)))


def read_acceptance(path: Path, temperature: float | None = None) -> Acceptance:
    """One temperature (None: the first) of what ``idlm eval acceptance --json`` printed; raises UserError."""
    try:
        rows = read_json(path)["temperatures"]
        measured = [Acceptance(float(r["temperature"]), tuple(r["by_depth"]), tuple(r["prefix"])) for r in rows]
        if not measured:
            raise KeyError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not what `idlm eval acceptance --json` prints") from None
    for row in measured:
        _check_chances(row.prefix, str(path))
    if temperature is None:
        return measured[0]
    for row in measured:
        if row.temperature == temperature:
            return row
    known = ", ".join(f"{row.temperature:g}" for row in measured)
    raise UserError(f"{path} has no temperature {temperature:g} (it has {known}; 0 is greedy)")


def _check_chances(values: Sequence[float], where: str) -> None:
    if not 0 < len(values) < MAX_STRIDE:
        raise UserError(f"{where}: give acceptance at 1 to {MAX_STRIDE - 1} depths, not {len(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{where}: acceptance is a share between 0 and 1, not {value!r}")


def analyse(
    model: str,
    costs: StepCosts,
    acceptance: Acceptance,
    *,
    source: str,
    batches: Sequence[int],
    context: int,
    rank: int = 0,
) -> Analysis:
    """Every stride that the acceptance tells of, in both layouts, at every batch size.

    ``rank`` is that of a gated adapter in the steps of strided decoding; AR does without. ``source`` says in words
    where the acceptance is from.
    """
    ways = [
        Way(stride, name, window_rows(layout, stride), acceptance.tokens_per_forward(stride, name))
        for name, layout in LAYOUTS.items()
        for stride in range(2, len(acceptance.prefix) + 2)
    ]
    points = []
    for batch in sorted(set(batches)):
        ar_seconds, ar_measured = costs.seconds(Shape(batch, AR.rows, context))
        points.append(Point(AR, batch, ar_seconds, ar_seconds, ar_measured, ar_measured))
        for way in ways:
            seconds, measured = costs.seconds(Shape(batch, way.rows, context, rank))
            points.append(Point(way, batch, seconds, ar_seconds, measured, ar_measured))
    order = sorted(costs.measured, key=lambda shape: (shape.rank, shape.context, shape.batch, shape.rows))
    checks = [Check(shape, costs.measured[shape], max(costs.floors(shape)), costs.predicted(shape)) for shape in order]
    return Analysis(model, source, costs, context, rank, tuple(ways), tuple(points), tuple(checks))
