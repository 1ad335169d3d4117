"""How far drafts carry in real decoding: tokens a forward, acceptance by depth and speed, beside AR (method.md 6.2)."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import DecodeStats, SamplingParams, total_stats
from idlm_jax.evaluation.equivalence import Comparison, compare, first_difference
from idlm_jax.model import Generation, LanguageModel, Prompt


@dataclass(frozen=True)
class Drafting:
    """What one way to decode did with a set of prompts at one temperature."""

    decode: DecodeConfig
    temperature: float
    prompts: int
    stats: DecodeStats
    # Of whole batches, without prefill and compilation; AR's with the same prompts, seeds and batches.
    tokens_per_second: float
    ar_tokens_per_second: float
    # Texts that are AR's token for token; None where they need only follow the same distribution.
    same: int | None

    @property
    def by_depth(self) -> tuple[float, ...]:
        """p_k: the share of drafts at depth k that were accepted, of those whose predecessors were."""
        reached = (self.stats.forwards - self.stats.cold_rounds, *self.stats.accepted[:-1])
        return tuple(a / r if r else 0.0 for a, r in zip(self.stats.accepted, reached, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            "stride": self.decode.stride,
            "layout": self.decode.layout,
            "coupling": self.decode.coupling,
            "temperature": self.temperature,
            "prompts": self.prompts,
            "tokens": self.stats.tokens,
            "forwards": self.stats.forwards,
            "tokens_per_forward": self.stats.tokens_per_forward,
            "acceptance_by_depth": list(self.by_depth),
            "acceptance_prefix": list(self.stats.acceptance),
            "cold_share": self.stats.cold_share,
            "tokens_per_second": self.tokens_per_second,
            "ar_tokens_per_second": self.ar_tokens_per_second,
            "same_as_ar": self.same,
        }


def measure_drafting(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    decodes: Sequence[DecodeConfig],
    temperatures: Sequence[float],
    *,
    max_tokens: int,
    batch_size: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> Iterator[Drafting]:
    """Answer all prompts by AR and in each of the ways ``decodes``, at each temperature (0: greedy).

    Yields one result a temperature and way, as soon as a temperature is done; ``say`` hears what is being decoded.
    Every prompt has a seed of its own. Programs are compiled once a way, whatever the number of temperatures. Raises
    UserError for requests that cannot run.
    """
    firsts = range(0, len(prompts), batch_size)
    number, total = itertools.count(1), len(temperatures) * len(firsts) * (1 + len(decodes))
    for temperature in temperatures:
        batches = []
        for first in firsts:
            batch = prompts[first : first + batch_size]
            seeds = range(seed + first, seed + first + len(batch))
            sampling = [SamplingParams(temperature, seed=each, max_tokens=max_tokens) for each in seeds]
            where = f"temperature {temperature:g}, prompts {first + 1} to {first + len(batch)}"

            def tell(way: str, where: str = where) -> None:
                say(f"{next(number)} of {total}: {where}, {way}")

            batches.append(compare(model, batch, sampling, decodes, tell))
        for way, decode in enumerate(decodes):
            yield _result(decode, temperature, batches, way)


def _result(decode: DecodeConfig, temperature: float, batches: list[list[Comparison]], way: int) -> Drafting:
    ours = [[comparison.candidates[way] for comparison in batch] for batch in batches]
    references = [[comparison.reference for comparison in batch] for batch in batches]
    pairs = [(a, b) for batch in zip(ours, references, strict=True) for a, b in zip(*batch, strict=True)]
    same = sum(first_difference(a.token_ids, b.token_ids) is None for a, b in pairs)
    return Drafting(
        decode,
        temperature,
        len(pairs),
        total_stats([answer.stats for answer, _ in pairs]),
        _tokens_per_second(ours),
        _tokens_per_second(references),
        same if temperature == 0 or decode.coupling == "gumbel" else None,
    )


def _tokens_per_second(batches: list[list[Generation]]) -> float:
    """The answers of a batch share its seconds."""
    tokens = sum(answer.stats.tokens for batch in batches for answer in batch)
    return tokens / sum(batch[0].seconds for batch in batches)


def markdown_table(rows: Sequence[Drafting]) -> str:
    """A table with a line a result."""
    header = "N | layout | coupling | temperature | TPF | accepted at depth 1 … | first k accepted | cold rounds"
    lines = [f"| {header} | tokens/s | AR tokens/s | same text as AR |", "|" + "---|" * 11]
    for row in rows:
        cells = (
            row.decode.stride,
            row.decode.layout,
            row.decode.coupling,
            f"{row.temperature:g}" if row.temperature else "greedy",
            f"{row.stats.tokens_per_forward:.3f}",
            " ".join(f"{share:.3f}" for share in row.by_depth),
            " ".join(f"{share:.3f}" for share in row.stats.acceptance),
            f"{row.stats.cold_share:.1%}",
            f"{row.tokens_per_second:.1f}",
            f"{row.ar_tokens_per_second:.1f}",
            "-" if row.same is None else f"{row.same}/{row.prompts}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
