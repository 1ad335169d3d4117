"""How answers look on a terminal: statistics, tables of several ways to decode, and lines that something is running."""

import sys
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from idlm_jax.decoding.generate import DecodeStats
    from idlm_jax.decoding.text import Piece
    from idlm_jax.evaluation.equivalence import Comparison
    from idlm_jax.evaluation.reports import Grid
    from idlm_jax.model import Generation, LanguageModel

# What takes longer than this says so.
_QUIET_SECONDS = 2.0
# A model may write any character; on a terminal, control characters would be commands.
_CONTROL = {code: "�" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\n\t"}
ACCEPTED_DRAFT = "green"


class Notice:
    """A context manager that prints one line on stderr if what it holds takes more than two seconds."""

    def __init__(self, what: str):
        self._timer = threading.Timer(_QUIET_SECONDS, self._print, [what])
        self._timer.daemon = True

    @staticmethod
    def _print(what: str) -> None:
        print(f"{what} …", file=sys.stderr, flush=True)

    def __enter__(self) -> "Notice":
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


def make_console() -> Console:
    """A console that prints markup and tables; wide where nobody looks, so that whoever reads it can wrap lines."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    return console


def show_grids(console: Console, grids: Iterable["Grid"]) -> None:
    """Tables of a report, each below its title."""
    for grid in grids:
        console.print(f"\n{grid.title}", soft_wrap=True)
        table = Table(*grid.header, box=SIMPLE_HEAD, pad_edge=False)
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def printable(text: str) -> str:
    """The text without what a terminal would take for a command; unchanged when stdout is not a terminal."""
    return text.translate(_CONTROL) if sys.stdout.isatty() else text


def show_piece(console: Console, piece: "Piece", drafts: bool = False) -> None:
    """Print new text at once, accepted drafts in a second colour if asked."""
    style = ACCEPTED_DRAFT if drafts and piece.drafted else None
    console.print(printable(piece.text), style=style, end="", markup=False, soft_wrap=True)


def statistics(answer: "Generation") -> str:
    """One line about how an answer was decoded."""
    stats, parts = answer.stats, []
    if answer.decode.stride > 1:
        parts.append(f"acceptance {acceptance(stats)}, {stats.cold_share:.0%} cold rounds")
    parts.append(f"{answer.seconds:.2f} s ({answer.tokens_per_second:.1f} tokens/s)")
    if answer.sampling.temperature > 0:
        parts.append(f"seed {answer.sampling.seed}")
    if answer.finish_reason == "length":
        parts.append(f"cut at {answer.sampling.max_tokens} tokens")
    forwards = f"{stats.tokens} tokens in {stats.forwards} forwards, {stats.tokens_per_forward:.2f} a forward"
    return "; ".join([forwards, *parts])


def acceptance(stats: "DecodeStats") -> str:
    """P_k, the share of verifying rounds that accepted the first k drafts, for k = 1, 2, …"""
    return " ".join(f"{share:.2f}" for share in stats.acceptance)


def comparison_table(comparisons: Sequence["Comparison"]) -> Table:
    """One column for AR and one for every other way; totals over the prompts, which were answered one after another."""
    from idlm_jax.evaluation.equivalence import describe, totals

    ways = totals(comparisons)
    ar_speed = ways[0].tokens_per_second
    table = Table("", *(describe(way.decode) for way in ways), box=SIMPLE_HEAD, pad_edge=False)

    def add(label: str, cells: Sequence[str]) -> None:
        table.add_row(label, *cells)

    add("tokens", [str(way.stats.tokens) for way in ways])
    add("forwards", [str(way.stats.forwards) for way in ways])
    add("tokens a forward (TPF)", [f"{way.stats.tokens_per_forward:.2f}" for way in ways])
    add("acceptance by depth P_k", [acceptance(way.stats) or "-" for way in ways])
    add("cold rounds", [f"{way.stats.cold_share:.0%}" if way.decode.stride > 1 else "-" for way in ways])
    add("seconds of decoding", [f"{way.seconds:.2f}" for way in ways])
    add("tokens a second", [f"{way.tokens_per_second:.1f}" for way in ways])
    add("speed, AR = 1", [f"{way.tokens_per_second / ar_speed:.2f}" if ar_speed else "-" for way in ways])
    add("same tokens as AR", ["-", *map(_sameness, zip(*(c.first_differences for c in comparisons), strict=True))])
    return table


def _sameness(first_differences: Sequence[int | None]) -> str:
    """Of one way to decode, over all prompts."""
    same = first_differences.count(None)
    if same == len(first_differences):
        return "yes"
    many = len(first_differences) > 1
    return f"{same} of {len(first_differences)} texts" if many else f"up to token {first_differences[0]}"


def show_comparison(console: Console, model: "LanguageModel", comparison: "Comparison") -> None:
    """The text, once if all ways agree, and the table."""
    show_texts(console, model, comparison)
    console.print(comparison_table([comparison]))
    if not comparison.identical:
        console.print(why_different(model, comparison), soft_wrap=True)


def show_texts(console: Console, model: "LanguageModel", comparison: "Comparison") -> None:
    """The text, once if all ways agree; else every text and where it first differs from AR's."""
    from idlm_jax.evaluation.equivalence import describe

    reference = comparison.reference
    if comparison.identical:
        _show_text(console, "AR and ISD, identical", reference.text)
        return
    _show_text(console, "AR", reference.text)
    for other, at in zip(comparison.candidates, comparison.first_differences, strict=True):
        _show_text(console, describe(other.decode), other.text if at is not None else "(identical)")
        if at is not None:
            ours, theirs = (_token(model, answer, at) for answer in (other, reference))
            console.print(f"[bold]first difference[/] at token {at}: {escape(ours)}, AR {escape(theirs)}")


def _show_text(console: Console, label: str, text: str) -> None:
    console.print(f"[bold]{label}:[/]", escape(printable(text)), soft_wrap=True)


def _token(model: "LanguageModel", answer: "Generation", position: int) -> str:
    if position >= len(answer.token_ids):
        return "the end"
    token = answer.token_ids[position]
    return f"{model.tokenizer.decode([token])!r} ({token})"


def why_different(model: "LanguageModel", comparison: "Comparison") -> str:
    """One sentence on what a differing text means."""
    if not comparison.must_agree:
        return "The ratio coupling gives another sample of the same distribution; gumbel gives the very text of AR."
    if model.model.dtype == "bfloat16":
        return (
            "In bfloat16, tokens whose logits are nearly equal can change places; float32 shows that it is only that."
        )
    return "In float32 the texts should be equal."
