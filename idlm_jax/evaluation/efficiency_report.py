"""An efficiency analysis as tables, Markdown and JSON; numbers from a predicted step carry a mark."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idlm_jax.evaluation.efficiency import AR, Analysis
from idlm_jax.evaluation.efficiency_plots import draw_steps, draw_throughput
from idlm_jax.evaluation.reports import Grid, markdown, write_files
from idlm_jax.plots import require_matplotlib, to_png

MARK = "≈"
FILES = ("analysis.md", "analysis.json", "throughput.png", "steps.png")
_PICTURES = """\
![tokens/s in total over tokens/s of a request](throughput.png)

![measured and predicted steps, tokens a forward](steps.png)"""


def write_report(analysis: Analysis, output: Path) -> None:
    """Write FILES into a directory, which is made if need be; raises UserError."""
    require_matplotlib()
    contents = (
        f"# {analysis.title}\n\n{explanation(analysis)}\n\n{_PICTURES}\n\n{markdown(grids(analysis))}",
        json.dumps(as_dict(analysis), indent=2) + "\n",
        to_png(draw_throughput(analysis)),
        to_png(draw_steps(analysis)),
    )
    write_files(output, dict(zip(FILES, contents, strict=True)))


def explanation(analysis: Analysis) -> str:
    """Where the numbers are from."""
    costs = analysis.costs
    device = f"{costs.device.bandwidth / 1e12:.3g} TB/s, {costs.device.peak / 1e12:.3g} TFLOP/s"
    lines = [f"Acceptance: {analysis.acceptance}. Sampling and prefill are left out."]
    if costs.measured:
        worst = max(abs(check.predicted / check.seconds - 1) for check in analysis.checks)
        lines.append(
            f"{MARK}: from a step that was not measured but predicted from bytes and FLOPs ({device}), by a fit that "
            f"misses the measured ones by at most {worst:.0%} (last table)."
        )
    else:
        lines.append(f"No step was measured: all times are floors, from bytes and FLOPs at {device}.")
    return " ".join(lines)


def grids(analysis: Analysis) -> list[Grid]:
    """Ways to decode; their steps; the best by batch; measured steps beside predicted ones, if there are any."""
    found = [_ways(analysis), _steps(analysis), _best(analysis)]
    return [*found, _checks(analysis)] if analysis.checks else found


def as_dict(analysis: Analysis) -> dict[str, Any]:
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


def _ways(analysis: Analysis) -> Grid:
    header = ("N", "layout", "rows", "TPF", "OH", "TPF²/rows", *(f"batch {batch}" for batch in analysis.batches))
    rows = []
    for way in analysis.ways:
        cells = (str(way.stride), way.layout, str(way.rows))
        numbers = (f"{number:.2f}" for number in (way.tokens_per_forward, way.overhead, way.efficiency))
        speeds = (_marked(f"{point.speed_up:.2f}", point.measured) for point in analysis.of_way(way))
        rows.append((*cells, *numbers, *speeds))
    title = "Tokens a forward (TPF), query tokens a token (OH), their ratio, and speed-up over AR by batch"
    return Grid(title, header, tuple(rows))


def _steps(analysis: Analysis) -> Grid:
    rows = []
    for way in (AR, *analysis.ways):
        points = analysis.of_way(way)
        cells = (f"{point.seconds * 1e3:.2f} ({point.step_ratio:.2f})" for point in points)
        marked = (_marked(cell, point.step_measured) for cell, point in zip(cells, points, strict=True))
        rows.append((way.name, str(way.rows), *marked))
    title = "Milliseconds of a step by batch (AR's = 1)"
    return Grid(title, ("", "rows", *(f"batch {batch}" for batch in analysis.batches)), tuple(rows))


def _best(analysis: Analysis) -> Grid:
    rows = []
    for batch in analysis.batches:
        ar, best = analysis.of_batch(batch)[0], analysis.best(batch)
        speeds = ((ar, ar.per_request), (best, best.per_request), (best, best.total))
        cells = (_marked(f"{speed:.0f}", point.step_measured) for point, speed in speeds)
        rows.append((str(batch), best.way.name, *cells, _marked(f"{best.speed_up:.2f}", best.measured)))
    header = ("batch", "fastest", "AR, tokens/s a request", "tokens/s a request", "tokens/s in total", "speed-up")
    return Grid("The fastest way to decode by batch", header, tuple(rows))


def _checks(analysis: Analysis) -> Grid:
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


def _marked(text: str, measured: bool) -> str:
    return text if measured else MARK + text
