"""``idlm info``: what a checkpoint or a configuration holds, and how much memory it needs."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from idlm_jax.checkpoint.atomic import gigabytes
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.checkpoint.summary import Summary


def info(
    path: Annotated[Positional[str], arg(metavar="PATH")],
    batch: int = 1,
    length: int = 4096,
    all: bool = False,
    json: bool = False,
) -> None:
    """Print the configuration, the parameter table, and the memory for weights and KV cache.

    Examples:
      idlm info checkpoints/qwen3-0.6b --batch 8 --length 32768
      idlm info configs/models/qwen3-8b.yaml

    Args:
        path: Orbax or Hugging Face directory, .gguf file, Hub id, config.json, or a YAML file of configs/models.
        batch: Requests decoded at once, for the KV cache.
        length: Tokens a request, for the KV cache.
        all: Print every layer instead of one row for all of them.
        json: Print one JSON object.
    """
    from idlm_jax.checkpoint.summary import kv_cache_size, summarize

    if batch < 1 or length < 1:
        raise UserError("--batch and --length must be at least 1")
    summary = summarize(path, fold=not all)
    cache = kv_cache_size(summary.config, summary.cache_dtype, batch, length)
    if json:
        print(_as_json(summary, batch, length, cache))
    else:
        _print(summary, batch, length, cache)


def _as_json(summary: "Summary", batch: int, length: int, cache: int) -> str:
    return json.dumps(
        {
            "path": summary.path,
            "kind": summary.kind,
            "config": dataclasses.asdict(summary.config),
            "tensors": [dataclasses.asdict(row) for row in summary.rows],
            "parameters": summary.parameters,
            "weights_bytes": summary.size,
            "kv_cache": {"batch": batch, "length": length, "dtype": summary.cache_dtype.name, "bytes": cache},
        },
        indent=2,
    )


def _print(summary: "Summary", batch: int, length: int, cache: int) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # whatever reads us can wrap lines itself
    console.print(f"[bold]{summary.path}[/] ({summary.kind})", soft_wrap=True)
    settings = Table("setting", "value", box=None, pad_edge=False)
    for field in dataclasses.fields(summary.config):
        value = getattr(summary.config, field.name)
        if field.name == "rope":
            default = type(value)()
            shown = [
                f"{f.name}={getattr(value, f.name)}"
                for f in dataclasses.fields(value)
                if f.name in ("theta", "kind") or getattr(value, f.name) != getattr(default, f.name)
            ]
            value = ", ".join(shown)
        settings.add_row(field.name, str(value))
    console.print(settings)
    console.print()
    table = Table("parameter", "shape", "axes", "dtype", box=None, pad_edge=False)
    table.add_column("layers", justify="right")
    table.add_column("size", justify="right")
    for row in summary.rows:
        table.add_row(
            row.name,
            " × ".join(map(str, row.shape)),
            ", ".join(row.axes),
            row.dtype,
            str(row.count) if row.count > 1 else "",
            gigabytes(row.size),
        )
    console.print(table)
    console.print()
    console.print(f"parameters  {summary.parameters:,}")
    console.print(f"weights     {gigabytes(summary.size)} in memory as stored")
    console.print(f"KV cache    {gigabytes(cache)} for batch {batch} × {length} tokens in {summary.cache_dtype.name}")
