"""Is the text of strided decoding the text of AR decoding? (design.md 7: exactness is the product.)"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import DecodeStats, SamplingParams, total_stats
from idlm_jax.model import Generation, LanguageModel, Prompt


@dataclass(frozen=True)
class Comparison:
    """One prompt answered by AR and in other ways."""

    reference: Generation
    candidates: tuple[Generation, ...]

    @property
    def first_differences(self) -> tuple[int | None, ...]:
        """For every candidate, the first token that is not the reference's; None if there is none."""
        return tuple(first_difference(self.reference.token_ids, other.token_ids) for other in self.candidates)

    @property
    def identical(self) -> bool:
        """Whether all candidates are the reference token for token."""
        return all(difference is None for difference in self.first_differences)

    @property
    def must_agree(self) -> bool:
        """Whether exact arithmetic makes the texts equal; otherwise they only follow the same distribution."""
        greedy = self.reference.sampling.temperature == 0
        return greedy or all(other.decode.coupling == "gumbel" for other in self.candidates)


@dataclass(frozen=True)
class Total:
    """What one way to decode took for several prompts, answered one after another."""

    decode: DecodeConfig
    stats: DecodeStats
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the time of decoding, without prefill and compilation."""
        return self.stats.tokens / self.seconds if self.seconds else 0.0


def totals(comparisons: Sequence[Comparison]) -> list[Total]:
    """Over all prompts: AR, then every other way."""
    ways = zip(*((c.reference, *c.candidates) for c in comparisons), strict=True)
    return [
        Total(way[0].decode, total_stats([answer.stats for answer in way]), sum(answer.seconds for answer in way))
        for way in ways
    ]


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The first position at which two texts differ, the end of the shorter one included; None if they are equal."""
    for position, (one, other) in enumerate(zip(tokens, others, strict=False)):
        if one != other:
            return position
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def compare(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    decodes: Sequence[DecodeConfig],
    say: Callable[[str], None] = lambda what: None,
) -> list[Comparison]:
    """Answer a batch of prompts by AR and in each of the ways ``decodes``, with the same seeds.

    AR is stride 1 of the first way: where an adapter is used ungated, it is the AR of the adapted model. ``say`` hears
    what is being decoded.
    """
    say("AR")
    references = model.generate(list(prompts), sampling, replace(decodes[0], stride=1))
    seeded = [reference.sampling for reference in references]
    ways = []
    for decode in decodes:
        say(describe(decode))
        ways.append(model.generate(list(prompts), seeded, decode))
    return [Comparison(*pair) for pair in zip(references, zip(*ways, strict=True), strict=True)]


def describe(decode: DecodeConfig) -> str:
    """A way to decode in a few words."""
    return "AR" if decode.stride == 1 else f"ISD, N = {decode.stride}, {decode.layout}"
