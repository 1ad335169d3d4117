"""``idlm demo``: a real model answers by AR and by strided decoding, token for token the same."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.markup import escape
from tyro.conf import arg

from idlm_jax.cli.flags import ModelFlags, check_can_draft
from idlm_jax.cli.render import Notice, make_console, show_comparison
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.evaluation.equivalence import Comparison
    from idlm_jax.model import LanguageModel

NAME = "smollm2"
PROMPT = "What is a neural network?"
STRIDE = 4
SEED = 6


def demo(
    *,
    prompt: Annotated[str, arg(metavar="TEXT")] = PROMPT,
    max_tokens: Annotated[int, arg(metavar="COUNT")] = 64,
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: SmolLM2-135M-Instruct)")] = None,
    directory: Annotated[Path, arg(metavar="DIR")] = Path("models"),
    model_flags: Annotated[ModelFlags, arg(name="")],
) -> int:
    """Answer a prompt by AR and by introspective strided decoding (ISD), and show that the tokens are the same.

    Fetches SmolLM2-135M-Instruct and converts it, unless that was done before. Ends with exit code 1 if any token
    differs in float32.

    Examples:
      idlm demo
      idlm demo --prompt "Why is the sky blue?" --max-tokens 128
      idlm demo --model checkpoints/i-dlm-8b

    Args:
        prompt: What to answer.
        max_tokens: Most tokens of an answer.
        model: Another model to show.
        directory: Where SmolLM2 is kept.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty")
    console = make_console()
    loaded = _load(model, directory, model_flags, console)
    console.print("[bold]prompt:[/]", escape(prompt), soft_wrap=True)
    agreed = True
    for title, temperature in (("Greedy", 0.0), (f"Sampled, temperature 0.8, top-p 0.95, seed {SEED}", 0.8)):
        comparison = _compare(loaded, prompt, temperature, max_tokens)
        console.print()
        console.print(f"[bold blue]{title}[/]")
        show_comparison(console, loaded, comparison)
        agreed &= comparison.identical
    _conclude(console, agreed, trained=model is not None or loaded.has_adapter)
    return 0 if agreed or loaded.model.dtype != "float32" else 1


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
    console.print(
        f"{name}: {config.family}, {config.num_hidden_layers} layers of {config.hidden_size}, "
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


def _compare(model: "LanguageModel", prompt: str, temperature: float, max_tokens: int) -> "Comparison":
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.decoding.generate import SamplingParams
    from idlm_jax.evaluation.equivalence import compare

    sampling = SamplingParams(temperature, top_p=0.95 if temperature else 1.0, seed=SEED, max_tokens=max_tokens)
    ways = [DecodeConfig(stride=STRIDE, layout=layout) for layout in ("branch", "standard")]
    with Notice("compiling and decoding"):
        return compare(model, [model.as_chat(prompt)], sampling, ways)[0]


def _conclude(console: Console, agreed: bool, trained: bool) -> None:
    if agreed:
        console.print("[bold green]Every text is AR's, token for token.[/]")
    else:
        print("idlm: error: a text differs from AR's", file=sys.stderr)
    if not trained:
        console.print(
            "This model has not been trained to draft, so its drafts are rarely right: ISD takes about as many forward "
            "passes as AR and is not faster here. The demo shows that it is exact; speed comes with a model or an "
            "adapter trained to draft.",
            soft_wrap=True,
        )
