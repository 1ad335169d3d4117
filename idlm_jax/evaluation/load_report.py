"""Measured load as tables, JSON and a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from idlm_jax.evaluation.load import PERCENTILES, Level
from idlm_jax.evaluation.reports import Grid, write_files
from idlm_jax.plots import BLUE, GREY, new_figure, plain_ticks, require_matplotlib, tidy, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("load.json", "load.png")
# Above this share of a processor the client may be what was measured.
_BUSY_CLIENT = 0.7
_TIMES = {"TTFT": "time_to_first", "TPOT": "time_per_token", "latency": "latency"}


def write_report(title: str, levels: Sequence[Level], output: Path) -> None:
    """Write FILES into a directory, which is made if need be; raises UserError."""
    require_matplotlib()
    everything = {"title": title, "levels": [as_dict(level) | {"records": _records(level)} for level in levels]}
    contents = (json.dumps(everything, indent=2) + "\n", to_png(draw(title, levels)))
    write_files(output, dict(zip(FILES, contents, strict=True)))


def as_dict(level: Level) -> dict[str, Any]:
    """A level as plain values; times in seconds."""
    times = {
        name: dict(zip((f"p{p}" for p in PERCENTILES), _finite(level.percentiles(what)), strict=True))
        for name, what in _TIMES.items()
    }
    return {
        "concurrency": level.concurrency,
        "rate": level.rate,
        "requests": len(level.records),
        "errors": level.errors,
        "prompt_tokens": sum(record.prompt_tokens for record in level.answered),
        "output_tokens": sum(record.tokens for record in level.answered),
        "seconds": level.seconds,
        "steady_seconds": None if level.steady is None else level.steady[1] - level.steady[0],
        "steady_tokens_per_second": level.steady_tokens_per_second,
        "tokens_per_second": level.tokens_per_second,
        "requests_per_second": len(level.answered) / level.seconds,
        "tokens_per_second_per_request": _speed_of_one(level),
        **times,
        "tokens_per_forward": level.tokens_per_forward,
        "acceptance": list(level.acceptance),
        "client_load": level.client_load,
    }


def remarks(levels: Sequence[Level]) -> list[str]:
    """What whoever reads the tables should know."""
    said = [
        "steady: while the load was full, tokens of a piece of text by its share of the characters; whole: from the "
        "first request to the last answer, filling and emptying included. Prompt and text: mean tokens as the server "
        "counts them. A request's tokens/s: 1 / median TPOT."
    ]
    busiest = max(level.client_load for level in levels)
    if busiest > _BUSY_CLIENT:
        said.append(f"This side took {busiest:.0%} of a processor: it, not the server, may be what was measured.")
    return said


def grids(levels: Sequence[Level]) -> list[Grid]:
    """Throughput, and times."""
    header = ("clients", "requests", "failed", "prompt", "text", "steady", "whole", "of a request", "requests/s")
    throughput = Grid("Tokens/s", (*header, "TPF", "acceptance"), tuple(map(_throughput, levels)))
    shown = [f"{name} p{p}" if p == PERCENTILES[0] else f"p{p}" for name in _TIMES for p in PERCENTILES]
    rows = []
    for level in levels:
        seconds = [second for what in _TIMES.values() for second in level.percentiles(what)]
        rows.append((_clients(level), *(_number(1e3 * second, 1) for second in seconds)))
    return [throughput, Grid("Milliseconds", ("clients", *shown), tuple(rows))]


def draw(title: str, levels: Sequence[Level]) -> "Figure":
    """Throughput over concurrency; and what one request gets over what all get."""
    figure = new_figure(9.2, 4.6)
    left, right = figure.subplots(1, 2)
    clients = [level.concurrency or _in_flight(level) for level in levels]
    steady = [level.steady_tokens_per_second or math.nan for level in levels]
    left.plot(clients, steady, "o-", color=BLUE, label="steady")
    left.plot(clients, [level.tokens_per_second for level in levels], "o--", color=GREY, label="whole run")
    left.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens/s in total")
    left.legend(frameon=False)
    total = [value if value == value else level.tokens_per_second for value, level in zip(steady, levels, strict=True)]
    alone = [_speed_of_one(level) or math.nan for level in levels]
    right.plot(total, alone, "o-", color=BLUE)
    for at, x, y in zip(clients, total, alone, strict=True):
        right.annotate(f"{at:.3g}", (x, y), (4, 4), textcoords="offset points", color=GREY)
    right.set(xscale="log", xlabel="tokens/s in total", ylabel="tokens/s of a request")
    for axis in (left, right):
        axis.margins(x=0.15, y=0.15)
        plain_ticks(axis.xaxis, (1, 2, 5))
        tidy(axis)
    plain_ticks(left.yaxis, (1, 2, 5))
    right.set_ylim(0, None)
    figure.suptitle(title, fontsize=11)
    return figure


def _throughput(level: Level) -> tuple[str, ...]:
    answered = level.answered
    kinds = ", ".join(f"{count} × {kind}" for kind, count in level.errors.items())
    return (
        _clients(level),
        str(len(level.records)),
        kinds or "0",
        _number(float(np.mean([record.prompt_tokens for record in answered])), 0),
        _number(float(np.mean([record.tokens for record in answered])), 0),
        _number(level.steady_tokens_per_second, 0),
        _number(level.tokens_per_second, 0),
        _number(_speed_of_one(level), 1),
        _number(len(answered) / level.seconds, 2),
        _number(level.tokens_per_forward, 2),
        " ".join(f"{share:.2f}" for share in level.acceptance) or "-",
    )


def _clients(level: Level) -> str:
    most = "" if level.concurrency is None else str(level.concurrency)
    return most if level.rate is None else f"{level.rate:g}/s {most and f'≤ {most}'}".strip()


def _speed_of_one(level: Level) -> float | None:
    median = level.percentiles("time_per_token")[0]
    return 1 / median if median > 0 else None


def _in_flight(level: Level) -> float:
    """Requests that were open, in the mean."""
    return sum(record.latency for record in level.records) / level.seconds


def _records(level: Level) -> list[dict[str, Any]]:
    """Every request, its first text in place of all its pieces."""
    kept = []
    for record in level.records:
        values = asdict(record) | {"first": record.first}
        kept.append({name: value for name, value in values.items() if name not in ("times", "sizes")})
    return kept


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"
