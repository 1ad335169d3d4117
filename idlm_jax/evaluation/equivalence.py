"""Is the text of strided decoding the text of AR decoding? (design.md 7: exactness is the product.)

Texts side by side, draws by the thousand for the tests of ``two_samples``, and the numbers a forward pass gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.layers import rope_tables
from idlm_jax.backbone.qwen3 import Block, Qwen3, causal_attention
from idlm_jax.decoding.cache import Cache, bucket, init_cache
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.forward import forward
from idlm_jax.decoding.generate import DecodeStats, SamplingParams, advance, start, total_stats
from idlm_jax.decoding.step import DecodeState, Policy
from idlm_jax.decoding.window import build_window, window_rows
from idlm_jax.evaluation.two_samples import ENDED
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


def prefill_copies(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    policy: Policy,
    copies: int,
) -> DecodeState:
    """The state before the first round of ``copies`` requests of each prompt, side by side: where ``draw`` starts."""
    many = [each for each in zip(prompts, sampling, strict=True) for _ in range(copies)]
    return start(model, [prompt for prompt, _ in many], [params for _, params in many], policy)


def draw(model: Qwen3, prefilled: DecodeState, first_seed: int, policy: Policy, tokens: int) -> DecodeState:
    """Decode every request of a state to its end, ``tokens`` tokens at most, with seeds ``first_seed …``, one each.

    ``prefilled`` stays as it is, so that prompts are prefilled once for any number of draws.
    """
    state = jax.tree.map(jnp.copy, prefilled)  # decoding donates its state
    seeds = first_seed + jnp.arange(state.pending.shape[0], dtype=jnp.uint32)
    filters = replace(state.filters, key=jax.vmap(jax.random.key)(seeds))
    state = replace(state, filters=filters, max_tokens=jnp.minimum(state.max_tokens, tokens))
    return advance(model, state, tokens, policy)


def drawn_texts(state: DecodeState, tokens: int) -> Int[np.ndarray, "B tokens"]:
    """What ``draw`` has decoded, ENDED after the end of a text."""
    texts, emitted = jax.device_get((state.tokens[:, :tokens], state.emitted))
    return np.where(np.arange(tokens) < emitted[:, None], texts, ENDED)


@jax.jit
def layer_outputs(model: Qwen3, tokens: Int[Array, "B L"]) -> Float[Array, "layers B L D"]:
    """The residual stream after every layer, in a plain causal pass of the base model."""
    attend = causal_attention(*tokens.shape)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, rope = model.embed(tokens, None), rope_tables(model.config.rope, model.config.head_dim, positions)
    outputs, layers = [], model.layers
    assert not isinstance(layers, Block), "stacked layers"
    for block in layers:
        x, _ = block(x, rope, attend, None, None)
        outputs.append(x)
    return jnp.stack(outputs)


def window_logits(
    model: Qwen3, tokens: Int[np.ndarray, "B L"], policy: Policy
) -> tuple[Float[np.ndarray, "B L V"], Float[np.ndarray, "B M V"]]:
    """What decoding computes on a given text: the logits of clean rows, and those of mask rows in window order.

    The text passes in windows of N tokens as if every draft had been right. Clean row i verifies token i + 1. In the
    branch layout mask rows i(N - 1) … draft the tokens after that one; in the standard layout there is one group a
    window, after its last token. L is a multiple of N.
    """
    batch, length = tokens.shape
    slots = bucket(length + window_rows(policy.layout, policy.stride))
    cache = init_cache(model.config, batch, slots, model.dtype)
    clean, masks = [], []
    for first in range(0, length, policy.stride):
        window = jnp.asarray(tokens[:, first : first + policy.stride])
        logits, cache = _window_step(model, cache, window, jnp.full(batch, first), policy)
        logits = np.asarray(logits)
        clean.append(logits[:, : policy.stride])
        masks.append(logits[:, policy.stride :])
    return np.concatenate(clean, axis=1), np.concatenate(masks, axis=1)


def _window_forward(
    model: Qwen3, cache: Cache, tokens_BN: Int[Array, "B N"], length_B: Int[Array, " B"], policy: Policy
) -> tuple[Float[Array, "B W V"], Cache]:
    warm = jnp.ones(len(length_B), bool)
    mask_token_id = model.config.mask_token_id or 0
    pending, drafts = tokens_BN[:, 0], tokens_BN[:, 1:]
    window = build_window(policy.layout, policy.stride, mask_token_id, length_B, pending, drafts, warm)
    hidden, cache = forward(
        model, window.tokens, window.positions, length_B, window.mask, cache, policy.adapter_from, policy.kernels
    )
    return model.logits(hidden), cache


_window_step = jax.jit(_window_forward, static_argnames=("policy",), donate_argnames=("cache",))
