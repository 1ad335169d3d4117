"""An efficiency analysis as tables, Markdown, JSON and pictures; numbers from a predicted step carry a mark."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.errors import UserError
from idlm_jax.plots import BLUE, DARK, GREY, ORANGE, new_figure, require_matplotlib, shade, tidy, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from idlm_jax.evaluation.efficiency import Analysis, Point
    from idlm_jax.evaluation.step_cost import Shape

MARK = "≈"
FILES = ("analysis.md", "analysis.json", "throughput.png", "steps.png")


@dataclass(frozen=True)
class Grid:
    """A table whose cells are text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_report(analysis: "Analysis", output: Path) -> None:
    """Write FILES into a directory, which is made if need be; raises UserError."""
    require_matplotlib()
    contents: Sequence[str | bytes] = (
        f"# {headline(analysis)}\n\n{explanation(analysis)}\n\n{markdown(analysis)}",
        json.dumps(as_dict(analysis), indent=2) + "\n",
        to_png(draw_throughput(analysis)),
        to_png(draw_steps(analysis)),
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in zip(FILES, contents, strict=True):
            write_file(output / name, content)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None


def headline(analysis: "Analysis") -> str:
    """What was analysed, in a line."""
    adapter = f", gated LoRA of rank {analysis.rank}" if analysis.rank else ""
    return f"{analysis.model} on {analysis.costs.device.name}, context {analysis.context}{adapter}"


def explanation(analysis: "Analysis") -> str:
    """Where the numbers are from."""
    costs = analysis.costs
    device = f"{costs.device.bandwidth / 1e12:.2f} TB/s, {costs.device.peak / 1e12:.0f} TFLOP/s"
    lines = [f"Acceptance: {analysis.acceptance}."]
    if not costs.measured:
        lines.append(f"No step was measured: all times are floors, from bytes and FLOPs at {device}.")
        return " ".join(lines)
    worst = max(abs(check.predicted / check.seconds - 1) for check in analysis.checks)
    lines.append(
        f"{MARK}: from a step that was not measured but predicted from bytes and FLOPs ({device}) as in the last "
        f"table, which is at most {worst:.0%} off the measured ones."
    )
    return " ".join(lines)


def grids(analysis: "Analysis") -> list[Grid]:
    """Ways to decode; their steps; the best by batch; measured steps beside predicted ones, if there are any."""
    found = [_ways(analysis), _steps(analysis), _best(analysis)]
    return [*found, _checks(analysis)] if analysis.checks else found


def markdown(analysis: "Analysis") -> str:
    """The tables."""
    parts = []
    for grid in grids(analysis):
        lines = [grid.header, ("---",) * len(grid.header), *grid.rows]
        parts.append(f"{grid.title}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)


def as_dict(analysis: "Analysis") -> dict[str, Any]:
    """Everything as plain values."""
    costs = analysis.costs
    return {
        "model": analysis.model,
        "acceptance": analysis.acceptance,
        "device": asdict(costs.device),
        "dtype": costs.dtype.name,
        "context": analysis.context,
        "adapter_rank": analysis.rank,
        "ways": [asdict(way) | {"overhead": way.overhead, "efficiency": way.efficiency} for way in analysis.ways],
        "points": [
            {
                "stride": point.way.stride,
                "layout": point.way.layout or None,
                "batch": point.batch,
                "step": point.seconds,
                "measured": point.step_measured,
                "step_ratio": point.step_ratio,
                "tokens_per_second_per_request": point.per_request,
                "tokens_per_second": point.total,
                "speed_up": point.speed_up,
            }
            for point in analysis.points
        ],
        "best": {
            batch: {"stride": best.way.stride, "layout": best.way.layout or None, "speed_up": best.speed_up}
            for batch in analysis.batches
            for best in [analysis.best(batch)]
        },
        "steps": [
            asdict(check.shape) | {"measured": check.seconds, "floor": check.floor, "predicted": check.predicted}
            for check in analysis.checks
        ],
    }


def _ways(analysis: "Analysis") -> Grid:
    header = ("N", "layout", "rows", "TPF", "OH", "TPF²/rows", *(f"batch {batch}" for batch in analysis.batches))
    rows = []
    for way in analysis.ways:
        cells = (str(way.stride), way.layout, str(way.rows))
        numbers = (f"{number:.2f}" for number in (way.tokens_per_forward, way.overhead, way.efficiency))
        speeds = (_marked(f"{point.speed_up:.2f}", point.measured) for point in _points(analysis, way.name))
        rows.append((*cells, *numbers, *speeds))
    title = "Tokens a forward (TPF), query tokens a token (OH), their ratio, and speed-up over AR by batch"
    return Grid(title, header, tuple(rows))


def _steps(analysis: "Analysis") -> Grid:
    rows = []
    for name in ("AR", *(way.name for way in analysis.ways)):
        points = _points(analysis, name)
        cells = (f"{point.seconds * 1e3:.2f} ({point.step_ratio:.2f})" for point in points)
        marked = (_marked(cell, point.step_measured) for cell, point in zip(cells, points, strict=True))
        rows.append((name, str(points[0].way.rows), *marked))
    title = "Milliseconds of a step by batch (AR's = 1)"
    return Grid(title, ("", "rows", *(f"batch {batch}" for batch in analysis.batches)), tuple(rows))


def _best(analysis: "Analysis") -> Grid:
    rows = []
    for batch in analysis.batches:
        ar, best = analysis.of_batch(batch)[0], analysis.best(batch)
        numbers = ((best, f"{best.per_request:.0f}"), (best, f"{best.total:.0f}"), (best, f"{best.speed_up:.2f}"))
        cells = (_marked(text, point.measured) for point, text in ((ar, f"{ar.per_request:.0f}"), *numbers))
        rows.append((str(batch), best.way.name, *cells))
    header = ("batch", "fastest", "AR, tokens/s a request", "tokens/s a request", "tokens/s in total", "speed-up")
    return Grid("The fastest way to decode by batch", header, tuple(rows))


def _checks(analysis: "Analysis") -> Grid:
    rows = []
    for check in analysis.checks:
        shape = check.shape
        sizes = (str(size) for size in (shape.batch, shape.rows, shape.context, shape.rank))
        times = (f"{seconds * 1e3:.2f}" for seconds in (check.seconds, check.floor, check.predicted))
        rows.append((*sizes, *times, f"{check.predicted / check.seconds - 1:+.1%}"))
    header = ("batch", "rows", "context", "rank", "measured ms", "floor ms", "predicted ms", "error")
    fits = {check.shape.rank: analysis.costs.fit(check.shape.rank) for check in analysis.checks}
    words = "; ".join(
        (f"rank {rank}: " if len(fits) > 1 else "") + f"{above:.2f} × larger + {exposed:.2f} × smaller"
        for rank, (above, exposed) in fits.items()
    )
    return Grid(f"Measured steps, and predictions from the times of bytes and FLOPs ({words})", header, tuple(rows))


def _points(analysis: "Analysis", name: str) -> "list[Point]":
    return [point for point in analysis.points if point.way.name == name]


def _marked(text: str, measured: bool) -> str:
    return text if measured else MARK + text


def draw_throughput(analysis: "Analysis") -> "Figure":
    """Tokens/s of the batch over tokens/s of a request, a panel a layout; every line goes through the batch sizes."""
    from matplotlib.lines import Line2D

    layouts = list(dict.fromkeys(way.layout for way in analysis.ways))
    figure = new_figure(11, 5.2)
    axes = figure.subplots(1, len(layouts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, layout in zip(axes, layouts, strict=True):
        ways = [way for way in analysis.ways if way.layout == layout]
        _draw_way(axis, _points(analysis, "AR"), DARK, "AR")
        for number, way in enumerate(ways):
            _draw_way(axis, _points(analysis, way.name), shade(number, len(ways)), f"N = {way.stride}")
        axis.set(xscale="log", yscale="log", title=f"{layout} layout", xlabel="tokens/s of a request")
        for which in (axis.xaxis, axis.yaxis):
            _plain_ticks(which)
        tidy(axis)
    for axis in axes:
        _draw_batches(axis, analysis)
    axes[0].set(ylabel="tokens/s in total")
    handles, _ = axes[0].get_legend_handles_labels()
    dots = {"step and AR's measured": DARK, "predicted": "white"}
    handles += [
        Line2D([], [], color=DARK, marker="o", mfc=fill, linestyle="", label=text) for text, fill in dots.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(headline(analysis), fontsize=11)
    return figure


def _draw_way(axis: "Axes", points: "Sequence[Point]", color: Any, label: str) -> None:
    x, y = [point.per_request for point in points], [point.total for point in points]
    axis.plot(x, y, color=color, linewidth=1.3, label=label)
    for point in points:
        fill = color if point.measured else "white"
        axis.plot(point.per_request, point.total, "o", color=color, markerfacecolor=fill, markersize=5)


def _draw_batches(axis: "Axes", analysis: "Analysis") -> None:
    """Where requests × tokens/s of each is the total: a line a batch size, named beside its fastest way."""
    for batch in analysis.batches:
        points = analysis.of_batch(batch)
        ends = [min(point.per_request for point in points) * 0.97, max(point.per_request for point in points) * 1.03]
        axis.plot(ends, [batch * x for x in ends], color=GREY, linewidth=0.7, linestyle=":", zorder=0)
        text = f"batch {batch}" if batch == analysis.batches[0] else str(batch)
        axis.annotate(text, (ends[1], batch * ends[1]), (3, 0), textcoords="offset points", color=GREY, va="center")


def draw_steps(analysis: "Analysis") -> "Figure":
    """Times of measured steps beside floor and prediction, and TPF and its efficiency by stride."""
    shown = bool(analysis.checks)
    figure = new_figure(11 if shown else 5.5, max(4.2, 1.5 + 0.3 * len(analysis.checks)))
    axes = figure.subplots(1, 1 + shown, squeeze=False)[0]
    if shown:
        _draw_checks(axes[0], analysis)
    _draw_efficiency(axes[-1], analysis)
    for axis in axes:
        tidy(axis)
    figure.suptitle(headline(analysis), fontsize=11)
    return figure


def _draw_checks(axis: "Axes", analysis: "Analysis") -> None:
    checks = analysis.checks
    heights = range(len(checks))
    series = (("floor: bytes or FLOPs", "|", GREY), ("predicted", "D", BLUE), ("measured", "o", ORANGE))
    values = ([c.floor for c in checks], [c.predicted for c in checks], [c.seconds for c in checks])
    for (label, marker, color), seconds in zip(series, values, strict=True):
        size, fill = (12, color) if marker == "|" else (6, "white" if marker == "D" else color)
        milliseconds = [1e3 * one for one in seconds]
        axis.plot(milliseconds, heights, marker, color=color, mfc=fill, ms=size, mew=1.5, linestyle="", label=label)
    axis.set_yticks(heights, [_shape_name(check.shape, analysis) for check in checks])
    axis.invert_yaxis()
    axis.set(xlim=(0, None), xlabel="ms a step", title="steps that were measured")
    axis.legend(frameon=False)


def _shape_name(shape: "Shape", analysis: "Analysis") -> str:
    shapes = analysis.costs.measured
    name = f"batch {shape.batch}, {shape.rows} row" + "s" * (shape.rows > 1)
    name += f", rank {shape.rank}" * (len({other.rank for other in shapes}) > 1)
    return name + f", context {shape.context}" * (len({other.context for other in shapes}) > 1)


def _draw_efficiency(axis: "Axes", analysis: "Analysis") -> None:
    """What acceptance alone says."""
    for layout, color in zip(dict.fromkeys(way.layout for way in analysis.ways), (BLUE, ORANGE), strict=True):
        ways = [way for way in analysis.ways if way.layout == layout]
        strides = [way.stride for way in ways]
        axis.plot(strides, [way.tokens_per_forward for way in ways], "o-", color=color, label=f"TPF, {layout}")
        axis.plot(
            strides, [way.efficiency for way in ways], "s--", color=color, mfc="white", label=f"TPF²/rows, {layout}"
        )
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set_xticks(sorted({way.stride for way in analysis.ways}))
    axis.set(ylim=(0, None), xlabel="stride N", title="tokens a forward, and per query token")
    axis.legend(frameon=False)


def _plain_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten, few enough to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
