"""Tokens a forward and acceptance by depth in real decoding, for every way to decode, beside AR on the same prompts.

Run by hand; the whole table on a GPU, a few prompts on a CPU::

    python scripts/measure_drafting.py models/smollm2 --adapter runs/smollm2_gated_lora_n4/adapter --dtype bfloat16
    python scripts/measure_drafting.py models/smollm2 --adapter smollm2-n4 --limit 4 --max-tokens 32 --strides 4

Prompts go through the chat template. Greedy texts and those of the gumbel coupling are compared with AR's: in float32
all should be the same, in bfloat16 near ties flip (docs/measurements.md). Acceptance at a depth counts drafts whose
predecessors were accepted. Seconds are those of decoding, without prefill and compilation; a batch lasts as long as its
longest text. A way to decode is compiled once for all temperatures.
"""

import json as jsonlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

import idlm_jax
from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.evaluation.drafting import markdown_table, measure_drafting


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    model: tyro.conf.Positional[str]
    # PEFT directory or name; acts on mask rows only.
    adapter: str | None = None
    # One prompt a line; each becomes a chat.
    prompts: Path = Path("scripts/prompts.txt")
    # Only the first so many prompts.
    limit: int | None = None
    max_tokens: int = 128
    # 0 is greedy.
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    strides: tuple[int, ...] = (2, 3, 4)
    layouts: tuple[Literal["standard", "branch"], ...] = ("standard", "branch")
    couplings: tuple[Literal["gumbel", "ratio"], ...] = ("gumbel", "ratio")
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Prompts decoded at once.
    batch_size: int = 64
    seed: int = 0
    # Also write the results into this file, a JSON object a line.
    json: Path | None = None


def main(settings: Settings) -> None:
    """Print the table."""
    model = idlm_jax.load(settings.model, settings.adapter, settings.dtype)
    prompts = [model.as_chat(line) for line in settings.prompts.read_text().splitlines()[: settings.limit]]
    decodes = [
        idlm_jax.DecodeConfig(stride=stride, layout=layout, coupling=coupling)
        for stride in settings.strides
        for layout in settings.layouts
        for coupling in settings.couplings
    ]
    rows = []
    for row in measure_drafting(
        model,
        prompts,
        decodes,
        settings.temperatures,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        say=lambda what: print(what, file=sys.stderr, flush=True),
    ):
        rows.append(row)
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": settings.model,
        "adapter": settings.adapter,
        "dtype": settings.dtype,
        "max_tokens": settings.max_tokens,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }
    if settings.json:
        write_file(settings.json, "".join(jsonlib.dumps(about | row.to_dict()) + "\n" for row in rows))
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except idlm_jax.UserError as error:
        sys.exit(f"error: {error}")
