"""``idlm bench analyse``: what strided decoding gains at each stride, layout and batch size."""

import json as jsonlib
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from idlm_jax.cli.flags import Model
from idlm_jax.cli.render import Notice, make_console, show_grids
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.config import ModelConfig
    from idlm_jax.evaluation.acceptance import Acceptance
    from idlm_jax.evaluation.efficiency import Analysis
    from idlm_jax.evaluation.step_cost import StepCosts

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXT = 1024
_NONE = "(default: none)"


def bench_analyse(
    model: Positional[Model],
    *,
    acceptance: Annotated[tuple[float, ...], arg(metavar="A1 A2 …", help_behavior_hint=_NONE)] = (),
    report: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint=_NONE)] = None,
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="(default: the report's first)")] = None,
    costs: Annotated[Path | None, arg(metavar="FILE.jsonl", help_behavior_hint=_NONE)] = None,
    bandwidth: Annotated[float | None, arg(metavar="TB/S", help_behavior_hint="(default: the cost table's)")] = None,
    peak: Annotated[float | None, arg(metavar="TFLOP/S", help_behavior_hint="(default: the cost table's)")] = None,
    batch: Annotated[tuple[int, ...], arg(metavar="B1 B2 …", help_behavior_hint="(default: 1 2 4 … 64)")] = BATCHES,
    context: Annotated[
        int | None, arg(metavar="TOKENS", help_behavior_hint=f"(default: the cost table's, else {_CONTEXT})")
    ] = None,
    adapter_rank: Annotated[int, arg(metavar="R")] = 0,
    output: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=_NONE)] = None,
    json: bool = False,
) -> None:
    """Tell what strided decoding gains over AR: by stride, layout and batch size, and which of them is fastest.

    Acceptance gives the tokens a forward (TPF), times of steps give tokens/s. OH is the query tokens that are processed
    for each token emitted; TPF/OH = TPF²/query tokens. Steps in the cost table count as measured, all others are
    predicted from bytes and FLOPs, by a fit to the measured ones, and marked. Sampling, prefill and batching are left
    out. --output writes the tables, their numbers and two pictures: tokens/s in total over tokens/s of a request,
    and measured steps beside predicted ones.

    Examples:
      idlm bench analyse configs/models/qwen3-8b.yaml --acceptance .9 .88 .86 --bandwidth 2.6 --peak 700
      idlm eval acceptance MODEL data/held-out --adapter runs/gated/adapter --json > acceptance.json
      python scripts/bench_decode_step.py --batch 1 8 64 --rows 1 7 16 --context 1024 --json > costs.jsonl
      idlm bench analyse configs/models/qwen3-8b.yaml --report acceptance.json --costs costs.jsonl --output analysis

    Args:
        model: The model that decodes: a YAML file of configs/models, or any checkpoint; its weights are not read.
        acceptance: Chance that the draft at depth 1, 2, … is accepted, if those before it were.
        report: What `idlm eval acceptance --json` printed, instead of --acceptance.
        temperature: Which of the report's temperatures; 0 is greedy.
        costs: Measured steps: what scripts/bench_decode_step.py --json printed.
        bandwidth: Memory bandwidth of the device, for predictions.
        peak: Rate of matrix products of the device, for predictions.
        batch: Batch sizes.
        context: Tokens in the cache.
        adapter_rank: Rank of the gated adapter that drafts; steps of AR do without.
        output: Directory for analysis.md, analysis.json, throughput.png and steps.png.
        json: Print one JSON object.
    """
    with Notice("analysing"):
        from idlm_jax.checkpoint.summary import summarize
        from idlm_jax.evaluation.efficiency import analyse
        from idlm_jax.evaluation.efficiency_report import as_dict, write_report

        _check(batch, context, adapter_rank)
        measured, source = _acceptance(acceptance, report, temperature)
        config = summarize(model).config
        step_costs = _costs(config, costs, bandwidth, peak)
        if context is None:
            context = (
                statistics.mode(shape.context for shape in step_costs.measured) if step_costs.measured else _CONTEXT
            )
        analysis = analyse(
            _name(model), step_costs, measured, source=source, batches=batch, context=context, rank=adapter_rank
        )
        if output is not None:
            write_report(analysis, output)
    if json:
        print(jsonlib.dumps(as_dict(analysis)))
    else:
        _show(analysis)


def _name(model: str) -> str:
    """What to call a model: its file or directory, which may have dots in it."""
    path = Path(model)
    return path.stem if path.suffix in (".yaml", ".yml", ".json", ".gguf") else path.name


def _check(batches: tuple[int, ...], context: int | None, rank: int) -> None:
    if not batches or min(batches) < 1:
        raise UserError("--batch needs sizes of at least 1")
    if context is not None and context < 0:
        raise UserError(f"--context must be at least 0, not {context}")
    if rank < 0:
        raise UserError(f"--adapter-rank must be at least 0 (none), not {rank}")


def _acceptance(values: tuple[float, ...], report: Path | None, temperature: float | None) -> tuple["Acceptance", str]:
    """The acceptance, and in words where it is from."""
    from idlm_jax.evaluation.efficiency import by_depth, read_acceptance

    if bool(values) == (report is not None):
        raise UserError("give either --acceptance A1 A2 …, or the --report of `idlm eval acceptance --json`")
    if report is None:
        if temperature is not None:
            raise UserError("--temperature chooses from a --report; --acceptance has none")
        return by_depth(values), f"{' '.join(f'{value:g}' for value in values)} by depth, taken as independent"
    measured = read_acceptance(report, temperature)
    name = "greedy" if measured.temperature == 0 else f"temperature {measured.temperature:g}"
    return measured, f"{report.name}, {name}; the first k drafts accepted: {_numbers(measured.prefix)}"


def _costs(config: "ModelConfig", path: Path | None, bandwidth: float | None, peak: float | None) -> "StepCosts":
    """Costs of a table's device, or of one that is known by two numbers."""
    import jax.numpy as jnp

    from idlm_jax.evaluation.step_cost import Device, StepCosts, read_costs

    if path is not None:
        if bandwidth is not None or peak is not None:
            raise UserError("--bandwidth and --peak are measured in the --costs; give either")
        return StepCosts.of_table(config, read_costs(path))
    if bandwidth is None or peak is None:
        raise UserError("give --costs FILE.jsonl, or --bandwidth TB/S and --peak TFLOP/S of the device")
    if not (0 < bandwidth < 1e6 and 0 < peak < 1e6):
        raise UserError("--bandwidth and --peak must be positive, in TB/s and TFLOP/s")
    device = Device(f"a device of {bandwidth:g} TB/s and {peak:g} TFLOP/s", bandwidth * 1e12, peak * 1e12)
    return StepCosts(config, device, jnp.dtype(jnp.bfloat16), {})


def _show(analysis: "Analysis") -> None:
    from idlm_jax.evaluation.efficiency_report import explanation, grids

    console = make_console()
    console.print(f"[bold]{analysis.title}[/]", soft_wrap=True)
    console.print(explanation(analysis), soft_wrap=True)
    show_grids(console, grids(analysis))


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
