"""``idlm demo``: a real model answers by AR and by strided decoding, token for token the same."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.markup import escape
from tyro.conf import UseAppendAction, arg

from idlm_jax.cli.flags import ModelFlags, check_can_draft
from idlm_jax.cli.render import Notice, comparison_table, make_console, show_texts, why_different
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.evaluation.equivalence import Comparison
    from idlm_jax.model import LanguageModel

NAME = "smollm2"
ADAPTER = "smollm2-n4"
# An explanation, a list and a program; short enough for two minutes on two CPU cores.
PROMPTS = (
    "What is a neural network?",
    "Name the seven days of the week.",
    "Write a Python function that checks whether a number is even.",
)
STRIDE = 4
SEED = 6
# At fewer tokens a forward than this, drafting is said to have failed.
RARELY_RIGHT = 1.1


def demo(
    *,
    prompt: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help_behavior_hint="(default: three short questions)")
    ] = (),
    max_tokens: Annotated[int, arg(metavar="COUNT")] = 64,
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: SmolLM2-135M-Instruct)")] = None,
    no_adapter: bool = False,
    directory: Annotated[Path, arg(metavar="DIR")] = Path("models"),
    model_flags: Annotated[ModelFlags, arg(name="")],
) -> int:
    """Answer prompts by AR and by introspective strided decoding (ISD), and show that the tokens are the same.

    Fetches SmolLM2-135M-Instruct and converts it, unless that was done before; the adapter that comes with the package
    drafts for it. Prompts are answered one after another. Ends with exit code 1 if any token differs in float32.

    Examples:
      idlm demo
      idlm demo --prompt "Why is the sky blue?" --max-tokens 128
      idlm demo --no-adapter
      idlm demo --model checkpoints/i-dlm-8b

    Args:
        prompt: What to answer; repeat it for several.
        max_tokens: Most tokens of an answer.
        model: Another model to show.
        no_adapter: Let SmolLM2 draft as it is, untrained.
        directory: Where SmolLM2 is kept.
    """
    prompts = prompt or PROMPTS
    if not all(text.strip() for text in prompts):
        raise UserError("the prompt is empty")
    console = make_console()
    loaded = _load(model, directory, _with_adapter(model, no_adapter, model_flags, console), console)
    greedy, sampled = (
        _show(console, loaded, prompts, title, temperature, max_tokens)
        for title, temperature in (("Greedy", 0.0), (f"Sampled, temperature 0.8, top-p 0.95, seed {SEED}", 0.8))
    )
    agreed = all(comparison.identical for comparison in (*greedy, *sampled))
    _conclude(console, agreed, greedy)
    failed = not agreed and loaded.model.dtype == "float32"
    if failed:
        print("idlm: error: a text differs from AR's", file=sys.stderr)
    return int(failed)


def _with_adapter(model: str | None, no_adapter: bool, flags: ModelFlags, console: Console) -> ModelFlags:
    """The flags with the shipped adapter, where SmolLM2 is shown and nothing else was asked for."""
    from idlm_jax.checkpoint.shipped import is_installed

    if no_adapter and flags.adapter is not None:
        raise UserError("give --adapter or --no-adapter, not both")
    if no_adapter or flags.adapter is not None or model is not None:
        return flags
    if not is_installed(ADAPTER):
        console.print(f"This installation lacks the adapter {ADAPTER}: SmolLM2 drafts untrained.", soft_wrap=True)
        return flags
    return replace(flags, adapter=ADAPTER)


def _load(model: str | None, directory: Path, flags: ModelFlags, console: Console) -> "LanguageModel":
    with Notice("starting JAX"):
        import jax

        from idlm_jax.decoding.config import DecodeConfig

        on_cpu = jax.default_backend() == "cpu"
    flags = replace(flags, dtype=flags.dtype or ("float32" if on_cpu else "bfloat16"))
    name = model or str(_prepare(directory, flags.dtype or "float32", console))
    loaded = flags.load(name)
    check_can_draft(name, loaded, DecodeConfig(stride=STRIDE))
    config = loaded.config
    adapter = f" with adapter {flags.adapter}" if flags.adapter else ""
    console.print(
        f"{name}{adapter}: {config.family}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{loaded.model.dtype} on {jax.devices()[0].device_kind}",
        soft_wrap=True,
    )
    return loaded


def _prepare(directory: Path, dtype: str, console: Console) -> Path:
    """The converted demo model, fetched and converted unless it is there already."""
    from idlm_jax.checkpoint.fetch import MODELS, fetch
    from idlm_jax.checkpoint.open import open_source
    from idlm_jax.checkpoint.source import parse_dtype, stored_size
    from idlm_jax.checkpoint.store import write_orbax
    from idlm_jax.cli.progress import Progress

    target = directory / NAME
    if target.exists():
        return target
    known = MODELS[NAME]
    there = (directory / known.file_name).exists()
    path = fetch(NAME, directory, say=(lambda line: None) if there else partial(print, flush=True))
    source, cast = open_source(path), parse_dtype(dtype)
    with Progress("converting", stored_size(source, cast)) as progress:
        write_orbax(source, target, cast, known.mask_token_id, progress=progress)
    console.print(f"{path} converted to {target}")
    return target


def _show(
    console: Console, model: "LanguageModel", prompts: Sequence[str], title: str, temperature: float, max_tokens: int
) -> list["Comparison"]:
    """Answer the prompts one after another, print each text as it comes, then one table over all of them."""
    console.print(f"\n[bold blue]{title}[/]")
    comparisons = []
    for prompt in prompts:
        console.print("\n[bold]prompt:[/]", escape(prompt), soft_wrap=True)
        comparisons.append(_compare(model, prompt, temperature, max_tokens))
        show_texts(console, model, comparisons[-1])
    console.print(comparison_table(comparisons))
    differing = [comparison for comparison in comparisons if not comparison.identical]
    if differing:
        console.print(why_different(model, differing[0]), soft_wrap=True)
    return comparisons


def _compare(model: "LanguageModel", prompt: str, temperature: float, max_tokens: int) -> "Comparison":
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.decoding.generate import SamplingParams
    from idlm_jax.evaluation.equivalence import compare

    sampling = SamplingParams(temperature, top_p=0.95 if temperature else 1.0, seed=SEED, max_tokens=max_tokens)
    ways = [DecodeConfig(stride=STRIDE, layout=layout) for layout in ("branch", "standard")]
    with Notice("compiling and decoding"):
        return compare(model, [model.as_chat(prompt)], sampling, ways)[0]


def _conclude(console: Console, agreed: bool, greedy: Sequence["Comparison"]) -> None:
    """What the answers showed, in words and as it was."""
    from idlm_jax.evaluation.equivalence import describe, totals

    if agreed:
        console.print("[bold green]Every text is AR's, token for token.[/]")
    ar, isd, *_ = totals(greedy)
    per_forward = isd.stats.tokens_per_forward
    console.print(
        f"Greedy: {isd.stats.tokens} tokens took {isd.stats.forwards} forward passes by {describe(isd.decode)} "
        f"(TPF {per_forward:.2f}), {ar.stats.forwards} by AR; {isd.seconds:.1f} s against {ar.seconds:.1f} s, "
        f"{isd.tokens_per_second / ar.tokens_per_second:.2f} times AR's speed.",
        soft_wrap=True,
    )
    if per_forward < RARELY_RIGHT:
        console.print(
            "The drafts were rarely right, as a model's are until it, or an adapter beside it, has been trained to "
            "draft (docs/training.md).",
            soft_wrap=True,
        )
