"""The two pictures of an efficiency analysis: what is gained, and what the steps behind it cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from idlm_jax.evaluation.efficiency import AR, Analysis, Point, Way
from idlm_jax.evaluation.step_cost import Shape
from idlm_jax.plots import BLUE, DARK, GREY, ORANGE, new_figure, plain_ticks, shade, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_throughput(analysis: Analysis) -> "Figure":
    """Tokens/s of the batch over tokens/s of a request, a panel a layout; every line goes through the batch sizes."""
    figure = new_figure(11, 5.2)
    layouts = _by_layout(analysis)
    axes = figure.subplots(1, len(layouts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (layout, ways) in zip(axes, layouts.items(), strict=True):
        _draw_batches(axis, analysis, (AR, *ways))
        for number, way in enumerate((AR, *ways)):
            color = DARK if way == AR else shade(number - 1, len(ways))
            _draw_way(axis, analysis.of_way(way), color, "AR" if way == AR else f"N = {way.stride}")
        axis.set(xscale="log", yscale="log", title=f"{layout} layout", xlabel="tokens/s of a request")
        axis.margins(x=0.15)
        plain_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
        plain_ticks(axis.yaxis, (1, 2, 5))
        tidy(axis)
    axes[0].set(ylabel="tokens/s in total")
    handles, _ = axes[0].get_legend_handles_labels()
    handles += [_handle("step measured", "o"), _handle("predicted", "o", fill="white")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    figure.suptitle(analysis.title, fontsize=11)
    return figure


def draw_steps(analysis: Analysis) -> "Figure":
    """Measured steps, their predictions and floors, a panel an adapter rank; beside it what acceptance alone says."""
    shapes = [shape for shape in analysis.costs.measured if shape.context == analysis.context]
    ranks = sorted({shape.rank for shape in shapes})
    figure = new_figure(4.6 * len(ranks) + 4.6, 4.6)
    axes = figure.subplots(1, len(ranks) + 1, squeeze=False)[0]
    for axis, rank in zip(axes, ranks, strict=False):
        _draw_costs(axis, analysis, [shape for shape in shapes if shape.rank == rank])
        axis.set(title=f"steps with a gated LoRA of rank {rank}" if rank else "steps without adapter")
    _draw_efficiency(axes[-1], analysis)
    for axis in axes:
        tidy(axis)
    figure.suptitle(analysis.title, fontsize=11)
    return figure


def _draw_batches(axis: "Axes", analysis: Analysis, ways: Sequence[Way]) -> None:
    """A line a batch size, where requests × tokens/s of each is the total; its number where the fastest way is."""
    for batch in analysis.batches:
        speeds = [point.per_request for point in analysis.of_batch(batch) if point.way in ways]
        ends = [min(speeds) * 0.97, max(speeds) * 1.03]
        axis.plot(ends, [batch * x for x in ends], color=GREY, linewidth=0.7, linestyle=":", zorder=0)
        text = f"batch {batch}" if batch == analysis.batches[0] else str(batch)
        axis.annotate(text, (ends[1], batch * ends[1]), (3, 0), textcoords="offset points", color=GREY, va="center")


def _draw_way(axis: "Axes", points: Sequence[Point], color: Any, label: str) -> None:
    axis.plot([p.per_request for p in points], [p.total for p in points], color=color, linewidth=1.3, label=label)
    for point in points:
        fill = color if point.step_measured else "white"
        axis.plot(point.per_request, point.total, "o", color=color, markerfacecolor=fill, markersize=5)


def _draw_costs(axis: "Axes", analysis: Analysis, shapes: Sequence[Shape]) -> None:
    """Milliseconds over window rows, a colour a batch size."""
    from matplotlib.ticker import MaxNLocator

    costs = analysis.costs
    batches = sorted({shape.batch for shape in shapes})
    rows = range(1, max(shape.rows for shape in shapes) + 1)
    for number, batch in enumerate(batches):
        color = shade(number, len(batches))
        line = [Shape(batch, width, analysis.context, shapes[0].rank) for width in rows]
        axis.plot(rows, [1e3 * costs.predicted(shape) for shape in line], color=color, linewidth=1.3)
        axis.plot(rows, [1e3 * max(costs.floors(shape)) for shape in line], ":", color=color, linewidth=1)
        measured = [shape for shape in shapes if shape.batch == batch]
        axis.plot(
            [s.rows for s in measured], [1e3 * costs.measured[s] for s in measured], "o", color=color, markersize=5
        )
        end = 1e3 * costs.predicted(line[-1])
        axis.annotate(f"batch {batch}", (rows[-1], end), (5, 0), textcoords="offset points", color=color, va="center")
    axis.set(ylim=(0, None), xlabel="window rows a request (1: AR)", ylabel="ms a step")
    axis.margins(x=0.05)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [_handle("measured", "o"), _handle("predicted", "", "-"), _handle("floor: bytes or FLOPs", "", ":")]
    axis.legend(handles=handles, frameon=False, loc="upper left")


def _draw_efficiency(axis: "Axes", analysis: Analysis) -> None:
    for (layout, ways), color in zip(_by_layout(analysis).items(), (BLUE, ORANGE), strict=True):
        strides = [way.stride for way in ways]
        axis.plot(strides, [way.tokens_per_forward for way in ways], "o-", color=color, label=f"TPF, {layout}")
        efficiency = [way.efficiency for way in ways]
        axis.plot(strides, efficiency, "s--", color=color, markerfacecolor="white", label=f"TPF²/rows, {layout}")
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set_xticks(sorted({way.stride for way in analysis.ways}))
    axis.set(xlabel="stride N", title="tokens a forward, and TPF / OH")
    # Room for the names above the lines.
    axis.set(ylim=(0, 1.4 * max(max(way.tokens_per_forward, way.efficiency) for way in analysis.ways)))
    axis.legend(frameon=False, loc="upper left", ncols=2)


def _by_layout(analysis: Analysis) -> dict[str, list[Way]]:
    layouts = dict.fromkeys(way.layout for way in analysis.ways)
    return {layout: [way for way in analysis.ways if way.layout == layout] for layout in layouts}


def _handle(label: str, marker: str = "", linestyle: Literal["", "-", ":"] = "", fill: str = DARK) -> Any:
    """An entry of a legend for what looks the same in every colour."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=DARK, marker=marker, linestyle=linestyle, markerfacecolor=fill, label=label)
