"""From logits to tokens in plain jnp: the filters, the noise, and the two exact couplings of draft and verification.

Filters are applied in one order to every distribution, the model's p and the draft's q alike: the mask token is
removed, then temperature, then top-k, then top-p on what top-k left (the order of transformers and vLLM). Ties with the
last kept token are kept, so the result does not depend on the order of the vocabulary. Temperature 0 means all mass on
the argmax.

Noise is a function of (request seed, output position, purpose, token) alone, so that a text does not depend on the
stride, the layout, the batch or the neighbours (design.md 7; method.md 3.7 for what exactness needs).
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# What a piece of noise is for; no two uses share bits.
PURPOSE_TOKEN, PURPOSE_ACCEPT, PURPOSE_DRAFT = range(3)
# Lower than every float32 number in the order of ``ordered``.
LOWEST = -(2**31)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """Per-request sampling parameters on the device."""

    temperature: Float[Array, " B"]  # 0 = greedy
    top_k: Int[Array, " B"]  # 0 = off
    top_p: Float[Array, " B"]  # 1 = off
    key: Key[Array, " B"]  # the request's seed


def filtered_log_probs(logits_BRV: Float[Array, "B R V"], filters: Filters) -> Float[Array, "B R V"]:
    """Normalised float32 log-probabilities after temperature, top-k and top-p; -inf for what they exclude."""
    greedy = (filters.temperature == 0)[:, None, None]
    scaled = logits_BRV.astype(jnp.float32) * sharpness(filters)[:, None, None]
    # The branch returns a threshold a row, not the row: the array over the vocabulary stays where it is, unused filters
    # cost nothing, and used ones become part of the kernels that follow.
    filtering = jnp.any((filters.top_k > 0) | (filters.top_p < 1))
    everything = jnp.full((*scaled.shape[:2], 1), LOWEST)
    threshold = jax.lax.cond(filtering, lambda: _lowest_kept(scaled, filters), lambda: everything)
    scaled = jnp.where(ordered(scaled) >= threshold, scaled, -jnp.inf)
    best = jnp.argmax(logits_BRV, axis=-1, keepdims=True) == jnp.arange(logits_BRV.shape[-1])
    return jnp.where(greedy, jnp.where(best, 0.0, -jnp.inf), jax.nn.log_softmax(scaled, axis=-1))


def sharpness(filters: Filters) -> Float[Array, " B"]:
    """What tempered logits are multiplied by: 1 / temperature, and 1 where greedy.

    Division itself is rounded in another way by every compiler; a product is the same everywhere, so that kernels and
    reference agree on each tempered logit to the last bit.
    """
    return 1 / jnp.where(filters.temperature == 0, 1, filters.temperature)


def _lowest_kept(scaled: Float[Array, "B R V"], filters: Filters) -> Int[Array, "B R 1"]:
    """Top-k, then top-p: the lowest value that both keep, in the order of ``ordered``."""
    top_k, top_p = filters.top_k[:, None, None], filters.top_p[:, None, None]
    lowest_k = _threshold(scaled, jnp.ones_like(scaled), top_k.astype(jnp.float32))
    lowest_k = jnp.where(top_k == 0, LOWEST, lowest_k)
    left = jnp.where(ordered(scaled) >= lowest_k, scaled, -jnp.inf)
    lowest_p = _threshold(left, jax.nn.softmax(left, axis=-1), top_p)
    return jnp.maximum(lowest_k, jnp.where(top_p >= 1, LOWEST, lowest_p))


def ordered(values: Float[Array, "*rows V"]) -> Int[Array, "*rows V"]:
    """Float32 mapped to int32 of the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)  # -0 and +0 are a tie
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _threshold(
    values: Float[Array, "*rows V"], weights: Float[Array, "*rows V"], target: Float[Array, "*rows 1"]
) -> Int[Array, "*rows 1"]:
    """The largest number such that the values from it on have weights that add up to ``target`` at least.

    Sort-free: bisects over the float32 numbers themselves, as ``ordered`` integers. 32 reductions give the exact
    threshold, and a reduction is far cheaper than a sort of a 150,000-token row.
    """
    numbers = ordered(values)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the upper average, without overflow
        enough = jnp.sum(jnp.where(numbers >= middle, weights, 0), axis=-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.full_like(numbers[..., :1], LOWEST)
    threshold, _ = jax.lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, jnp.iinfo(jnp.int32).max)))
    return threshold


def row_keys(key_B: Key[Array, " B"], position_BR: Int[Array, "B R"], purpose: int) -> Key[Array, "B R"]:
    """The key of every row's noise, from the request's seed, the output position and what the noise is for."""
    at_position = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, position_BR)
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(at_position, purpose)


def gumbel_argmax(
    log_probs_BRV: Float[Array, "B R V"], key_B: Key[Array, " B"], position_BR: Int[Array, "B R"], purpose: int
) -> Int[Array, "B R"]:
    """One draw from each row: argmax of log-probability plus the noise of that output position.

    The noise uses the high-precision mode of ``jax.random.gumbel``: the other one rounds the upper tail to 2^-23, which
    a 150,000-token vocabulary would feel.
    """

    def draw(log_probs: Array, key: Array) -> Array:
        noise = jax.random.gumbel(key, log_probs.shape, jnp.float32, mode="high")
        return jnp.argmax(log_probs + noise).astype(jnp.int32)

    return jax.vmap(jax.vmap(draw))(log_probs_BRV, row_keys(key_B, position_BR, purpose))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafts:
    """What one round proposes for the next: N - 1 tokens and, if the coupling needs it, their distribution."""

    tokens: Int[Array, "B drafts"]
    # Filtered log q of every draft, stored by the ratio coupling only.
    log_q: Float[Array, "B drafts V"] | None


class Coupling(Protocol):
    """How drafts are made and accepted; every implementation leaves the distribution of the text exactly AR's."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    @property
    def stores_q(self) -> bool:
        """Whether verification needs the distribution that drafts were drawn from."""
        ...

    def draft(
        self, log_q: Float[Array, "B drafts V"], key_B: Key[Array, " B"], position: Int[Array, "B drafts"]
    ) -> Drafts:
        """Draw drafts for the given output positions."""
        ...

    def verify(
        self,
        log_p: Float[Array, "B N V"],
        drafts: Drafts,
        warm_B: Bool[Array, " B"],
        key_B: Key[Array, " B"],
        position: Int[Array, "B N"],
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Number of leading drafts accepted (0 where not warm), and the token that follows them."""
        ...


def leading(agreed: Bool[Array, "B drafts"], warm_B: Bool[Array, " B"]) -> Int[Array, " B"]:
    """How many drafts are right before the first wrong one; 0 where not warm."""
    return jnp.sum(jnp.cumprod(agreed & warm_B[:, None], axis=1, dtype=jnp.int32), axis=1)


def agreeing(
    tokens: Int[Array, "B N"], drafts: Drafts, warm_B: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Number of leading drafts that are the tokens themselves, and the token after them."""
    accepted = leading(tokens[:, :-1] == drafts.tokens, warm_B)
    return accepted, jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]


def accepted_by_ratio(
    log_p: Float[Array, "B drafts"],
    drafts: Drafts,
    warm_B: Bool[Array, " B"],
    key_B: Key[Array, " B"],
    position: Int[Array, "B N"],
) -> Int[Array, " B"]:
    """Number of leading drafts accepted with probability min(1, p / q); ``log_p`` is that of the drafts themselves."""
    assert drafts.log_q is not None
    q = jnp.exp(jnp.take_along_axis(drafts.log_q, drafts.tokens[:, :, None], axis=2)[:, :, 0])
    uniform = jax.vmap(jax.vmap(jax.random.uniform))(row_keys(key_B, position[:, :-1], PURPOSE_ACCEPT))
    return leading(uniform * q < jnp.exp(log_p), warm_B)


def corrected(
    log_p_row: Float[Array, "B 1 V"], drafts: Drafts, accepted: Int[Array, " B"], warm_B: Bool[Array, " B"]
) -> Float[Array, "B 1 V"]:
    """Logits of the token after the accepted drafts: after a rejection, those of the positive part of p - q."""
    assert drafts.log_q is not None
    depth = drafts.tokens.shape[1]
    if depth == 0:
        return log_p_row
    row = accepted[:, None, None]
    log_q_row = jnp.take_along_axis(drafts.log_q, jnp.minimum(row, depth - 1), axis=1)
    residual = jnp.maximum(jnp.exp(log_p_row) - jnp.exp(log_q_row), 0.0)
    # p and q can agree to the last bit of their sums; then nothing was over-proposed and p itself is right.
    rejected = warm_B[:, None, None] & (row < depth) & (jnp.sum(residual, axis=-1, keepdims=True) > 0)
    return jnp.where(rejected, jnp.log(residual), log_p_row)


@dataclass(frozen=True)
class GumbelCoupling:
    """Common random numbers: token = argmax(log p + g), draft = argmax(log q + g) with the same g; accept if equal.

    The text is a function of (prompt, seed, sampling parameters): the same as AR sampling with that seed.
    """

    name: str = "gumbel"
    stores_q: bool = False

    def draft(
        self, log_q: Float[Array, "B drafts V"], key_B: Key[Array, " B"], position: Int[Array, "B drafts"]
    ) -> Drafts:
        """Drafts share the noise of the token they stand for."""
        return Drafts(gumbel_argmax(log_q, key_B, position, PURPOSE_TOKEN), None)

    def verify(
        self,
        log_p: Float[Array, "B N V"],
        drafts: Drafts,
        warm_B: Bool[Array, " B"],
        key_B: Key[Array, " B"],
        position: Int[Array, "B N"],
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Draw the AR token of every row; a draft is right if it is that token."""
        return agreeing(gumbel_argmax(log_p, key_B, position, PURPOSE_TOKEN), drafts, warm_B)


@dataclass(frozen=True)
class RatioCoupling:
    """The paper's rule: sample drafts from q, accept with min(1, p / q), correct from the positive part of p - q.

    Exact because p and q are both taken after the filters and drafts are drawn from the very q that is stored
    (method.md 3.7, 3.8).
    """

    name: str = "ratio"
    stores_q: bool = True

    def draft(
        self, log_q: Float[Array, "B drafts V"], key_B: Key[Array, " B"], position: Int[Array, "B drafts"]
    ) -> Drafts:
        """Drafts have noise of their own, independent of what verifies them."""
        return Drafts(gumbel_argmax(log_q, key_B, position, PURPOSE_DRAFT), log_q)

    def verify(
        self,
        log_p: Float[Array, "B N V"],
        drafts: Drafts,
        warm_B: Bool[Array, " B"],
        key_B: Key[Array, " B"],
        position: Int[Array, "B N"],
    ) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """Accept draft k with probability min(1, p_k / q_k); the first rejected one is replaced from the residual."""
        assert drafts.log_q is not None
        chosen_log_p = jnp.take_along_axis(log_p[:, :-1], drafts.tokens[:, :, None], axis=2)[:, :, 0]
        accepted = accepted_by_ratio(chosen_log_p, drafts, warm_B, key_B, position)
        row = accepted[:, None]
        log_p_row = corrected(jnp.take_along_axis(log_p, row[:, :, None], axis=1), drafts, accepted, warm_B)
        position_row = jnp.take_along_axis(position, row, axis=1)
        return accepted, gumbel_argmax(log_p_row, key_B, position_row, PURPOSE_TOKEN)[:, 0]


COUPLINGS: dict[str, Coupling] = {coupling.name: coupling for coupling in (GumbelCoupling(), RatioCoupling())}


def empty_drafts(coupling: Coupling, batch: int, depth: int, vocabulary: int) -> Drafts:
    """Drafts that nobody has drawn."""
    log_q = jnp.zeros((batch, depth, vocabulary)) if coupling.stores_q else None
    return Drafts(jnp.zeros((batch, depth), jnp.int32), log_q)


def without_token(logits: Float[Array, "*rows V"], removed: int | None) -> Float[Array, "*rows V"]:
    """Logits of which one token, the mask, can never be drawn."""
    return logits if removed is None else logits.at[..., removed].set(-jnp.inf)


def verify(
    logits_BWV: Float[Array, "B W V"],
    filters: Filters,
    coupling: Coupling,
    drafts: Drafts,
    warm_B: Bool[Array, " B"],
    position_BN: Int[Array, "B N"],
    removed: int | None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """As ``api.verify``, by the coupling's own methods."""
    clean = without_token(logits_BWV[:, : position_BN.shape[1]], removed)
    return coupling.verify(filtered_log_probs(clean, filters), drafts, warm_B, filters.key, position_BN)


def draft(
    logits_BWV: Float[Array, "B W V"],
    row_Bd: Int[Array, "B drafts"],
    filters: Filters,
    coupling: Coupling,
    position_Bd: Int[Array, "B drafts"],
    removed: int | None,
) -> Drafts:
    """As ``api.draft``, by the coupling's own methods."""
    rows = without_token(jnp.take_along_axis(logits_BWV, row_Bd[:, :, None], axis=1), removed)
    return coupling.draft(filtered_log_probs(rows, filters), filters.key, position_Bd)
