"""``idlm eval acceptance``: how often the drafts of a model would be accepted on given text."""

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from idlm_jax.cli.flags import Model
from idlm_jax.cli.render import Notice, make_console

if TYPE_CHECKING:
    from idlm_jax.evaluation.acceptance import AcceptanceReport

LAYOUTS = ("standard", "branch")


def eval_acceptance(
    model: Positional[Model],
    data: Positional[Annotated[str, arg(metavar="STORE")]],
    *,
    adapter: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None,
    ungated: bool = False,
    mask_token: Annotated[
        str | None, arg(metavar="TOKEN", help_behavior_hint="(default: the model's or the adapter's)")
    ] = None,
    base: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: none)")] = None,
    block_size: int = 3,
    temperature: Annotated[
        UseAppendAction[tuple[float, ...]], arg(metavar="T", help_behavior_hint="(default: 1)")
    ] = (),
    documents: int = 256,
    length: int = 1024,
    batch_size: int = 8,
    dtype: Annotated[str, arg(metavar="{bfloat16,float32}")] = "bfloat16",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Measure introspective acceptance by draft depth, and the tokens a forward (TPF) that it amounts to.

    The text of a token store goes through the model once, with groups of mask rows at random places. A draft at depth k
    is accepted with probability sum(min(p, q)): p is what the model says of that token, q what the mask row says. TPF
    is given for every stride and layout; real decoding differs as far as the text differs. Perplexity is that of the
    model without drafting, beside the one of a base model if one is given.

    Examples:
      idlm eval acceptance models/smollm2 data/held-out --adapter runs/gated/adapter
      idlm eval acceptance runs/full/model data/held-out --base models/smollm2 --temperature 0.7 --temperature 1

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name).
        data: Token store made by `idlm data`.
        adapter: PEFT LoRA directory; acts on mask rows only.
        ungated: Apply the adapter to every row.
        mask_token: Text or id of the token whose rows draft.
        base: Another model to compare the perplexity with.
        block_size: Masks a group; strides up to block_size + 1 are reported.
        temperature: Sampling temperature; repeat for several. Greedy agreement is always measured.
        documents: How many documents of the store to measure on (0: all).
        length: Tokens a row.
        batch_size: Rows at a time.
        dtype: Of weights and activations.
        seed: Of the choice of documents and of the places of groups.
        json: Print one JSON object.
    """
    with Notice("loading and measuring"):
        from idlm_jax.evaluation.acceptance import evaluate_store

        report, base_report = evaluate_store(
            model,
            data,
            adapter=adapter,
            gated=not ungated,
            mask_token=mask_token,
            base=base,
            block_size=block_size,
            temperatures=temperature or (1.0,),
            documents=documents,
            length=length,
            batch_size=batch_size,
            dtype=dtype,
            seed=seed,
        )
    if json:
        values = as_dict(report)
        if base_report is not None:
            values["base_perplexity"] = base_report.perplexity
        print(jsonlib.dumps(values))
        return
    console = make_console()
    console.print(acceptance_table(report))
    console.print(f"{report.rows} drafts, {report.tokens} learnt tokens; perplexity {report.perplexity:.3f}", end="")
    console.print("" if base_report is None else f", base model {base_report.perplexity:.3f}")


def acceptance_table(report: "AcceptanceReport") -> Table:
    """One line a temperature: acceptance by depth, and TPF by stride and layout."""
    depth = len(report.temperatures[0].by_depth)
    strides = range(2, depth + 2)
    table = Table("temperature", "acceptance by depth", "first k accepted P_k", box=SIMPLE_HEAD, pad_edge=False)
    for layout in LAYOUTS:
        table.add_column(f"TPF {layout}, N = {', '.join(map(str, strides))}")
    for row in report.temperatures:
        table.add_row(
            "greedy" if row.temperature == 0 else f"{row.temperature:g}",
            _numbers(row.by_depth),
            _numbers(row.prefix),
            *(_numbers([row.tokens_per_forward(stride, layout) for stride in strides]) for layout in LAYOUTS),
        )
    return table


def as_dict(report: "AcceptanceReport") -> dict[str, Any]:
    """Everything as plain values, TPF included."""
    values = asdict(report)
    for row, measured in zip(values["temperatures"], report.temperatures, strict=True):
        row["tokens_per_forward"] = {
            layout: {stride: measured.tokens_per_forward(stride, layout) for stride in range(2, len(row["prefix"]) + 2)}
            for layout in LAYOUTS
        }
    return values


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in values)
