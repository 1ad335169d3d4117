"""Exactness: ISD gives the very tokens of AR, greedy or with the same noise, wherever a text ends.

The reference is AR done naively: a full causal forward a token, without cache, window or drafts. The model's drafts are
right about half of the time, so accepted and rejected drafts of every depth occur.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.generate import Emission, SamplingParams, advance, emissions, generate_tokens, start
from idlm_jax.decoding.sampling import COUPLINGS, PURPOSE_TOKEN
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS
from tests.decoding.helpers import (
    AR,
    LONGEST,
    MASK,
    MOST,
    VOCAB,
    decode,
    drafting_adapter,
    drafting_model,
    full_forward,
    greedy_texts,
    make_policy,
    naive_ar,
    random_prompts,
    texts,
)
from tests.decoding.support import Cell, filtered_probabilities

STRIDES = (2, 3, 4, 8, 16)
# (temperature, top_k, top_p) of the requests of one batch, in turn.
MIXED = ((1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.9), (0.0, 0, 1.0), (1.0, 20, 0.8))


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    stride: int
    layout: str
    coupling: str
    adapter: bool

    @property
    def policy(self) -> Policy:
        return make_policy(self.stride, self.layout, self.coupling)

    @property
    def model(self) -> Qwen3:
        return drafting_model(drafting_adapter() if self.adapter else None)

    def __str__(self) -> str:
        return f"N{self.stride}-{self.layout}-{self.coupling}-{'lora' if self.adapter else 'base'}"


def ways(*couplings: str) -> pytest.MarkDecorator:
    """All ways; of every two that differ in the adapter alone, one runs by default and the other is slow."""
    levels = itertools.product(enumerate(STRIDES), enumerate(LAYOUTS), enumerate(COUPLINGS), (False, True))
    params = [
        pytest.param(
            Way(stride, layout, coupling, adapter),
            id=str(Way(stride, layout, coupling, adapter)),
            marks=() if adapter == bool((i + j + k) % 2) else pytest.mark.slow,
        )
        for (i, stride), (j, layout), (k, coupling), adapter in levels
        if coupling in couplings
    ]
    # Module scope: pytest runs the tests of one way together, so that they share its compiled program.
    return pytest.mark.parametrize("way", params, scope="module")


@cache
def greedy_run(way: Way) -> list[Emission]:
    prompts, _ = greedy_texts()
    return decode(way.model, prompts, [SamplingParams(max_tokens=MOST)] * len(prompts), way.policy)


@ways(*COUPLINGS)
def test_greedy_isd_equals_greedy_ar(way: Way) -> None:
    run = greedy_run(way)
    assert texts(run) == greedy_texts()[1]
    # Drafts were both accepted and rejected, or the equality would prove little.
    outcomes = np.concatenate([emission.history for emission in run])
    verified = outcomes[outcomes >= 0]
    assert 0.2 < (verified > 0).mean() < 0.9
    assert verified.max() >= min(way.stride - 1, 4)


@ways(*COUPLINGS)
def test_an_end_token_ends_the_text_right_there_at_every_offset_of_a_round(way: Way) -> None:
    prompts, expected = greedy_texts()
    requests, ends = [], []
    for request, text in enumerate(expected):
        firsts = sorted({text.index(token) for token in text})
        for end in firsts:
            requests.append(request)
            ends.append(end)
    # As many as two batches hold, spread over the texts.
    step = max(1, len(requests) // 61)
    requests, ends = requests[::step][:62], ends[::step][:62]
    sampling = [
        SamplingParams(max_tokens=MOST, stop_token_ids=(expected[request][end],))
        for request, end in zip(requests, ends, strict=True)
    ]
    run = decode(way.model, [prompts[request] for request in requests], sampling, way.policy)
    offsets = set()
    for request, end, emission in zip(requests, ends, run, strict=True):
        assert emission.tokens.tolist() == expected[request][: end + 1]
        assert emission.done
        full = np.maximum(emission.history, 0) + 1
        before = full[:-1].sum()
        assert before <= end < before + full[-1]  # the last round is the one with the end token
        offsets.add(int(end - before))
    if way.stride <= 3:
        assert offsets == set(range(way.stride))


@ways(*COUPLINGS)
def test_every_token_limit_is_met_exactly(way: Way) -> None:
    prompts, expected = greedy_texts()
    limits = list(range(1, 2 * way.stride + 2))
    requests = [limit % len(prompts) for limit in limits]
    sampling = [SamplingParams(max_tokens=limit) for limit in limits]
    run = decode(way.model, [prompts[request] for request in requests], sampling, way.policy)
    for request, limit, emission in zip(requests, limits, run, strict=True):
        assert emission.tokens.tolist() == expected[request][:limit]
        assert emission.done


def mixed_requests(count: int = 31) -> tuple[list[list[int]], list[SamplingParams]]:
    prompts = random_prompts(count, seed=5)
    sampling = []
    for i in range(count):
        temperature, top_k, top_p = MIXED[i % len(MIXED)]
        sampling.append(SamplingParams(temperature, top_k, top_p, seed=1000 + i, max_tokens=MOST))
    return prompts, sampling


@cache
def gumbel_texts() -> list[list[int]]:
    """Sampled AR texts by naive means: a full forward a token, filters by sorting, the noise of (seed, position)."""
    prompts, sampling = mixed_requests()

    @jax.jit
    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), PURPOSE_TOKEN)
        return jax.random.gumbel(key, (VOCAB,), jnp.float32, mode="high")

    def choose(request: int, position: int, logits: np.ndarray) -> int:
        params = sampling[request]
        if params.temperature == 0:
            return int(np.argmax(logits))
        cell = Cell(1, "branch", "gumbel", params.temperature, params.top_k, params.top_p, False)
        with np.errstate(divide="ignore"):
            log_p = np.log(filtered_probabilities(logits.copy(), cell, MASK))
        return int(np.argmax(log_p + np.asarray(noise(np.uint32(params.seed), position))))

    return naive_ar(drafting_model(), prompts, MOST, choose)


def test_sampled_ar_is_naive_sampling_with_the_noise_of_seed_and_position() -> None:
    prompts, sampling = mixed_requests()
    assert texts(decode(drafting_model(), prompts, sampling, AR)) == gumbel_texts()
    # Other seeds, other texts: the noise matters.
    other = [replace(params, seed=params.seed + 50_000) for params in sampling]
    sampled = [i for i, params in enumerate(sampling) if params.temperature]
    again = texts(decode(drafting_model(), prompts, other, AR))
    assert all(again[i] != gumbel_texts()[i] for i in sampled)


@ways("gumbel")
def test_gumbel_text_is_that_of_ar_with_that_seed_for_every_stride_and_layout(way: Way) -> None:
    prompts, sampling = mixed_requests()
    assert texts(decode(way.model, prompts, sampling, way.policy)) == gumbel_texts()


@pytest.mark.parametrize(("count", "layout"), [(1, "standard"), (2, "branch"), (3, "standard"), (5, "branch")])
def test_gumbel_text_does_not_depend_on_batch_size_and_neighbours(count: int, layout: str) -> None:
    prompts, sampling = mixed_requests()
    for first in (0, 30 - count):
        part = slice(first, first + count)
        run = generate_tokens(drafting_model(), prompts[part], sampling[part], make_policy(3, layout))
        assert texts(run) == gumbel_texts()[part]


@ways("ratio")
def test_ratio_text_depends_on_the_request_alone_not_on_order_and_neighbours(way: Way) -> None:
    """It is not AR's text, but it must be the same again: order and neighbours of a batch change nothing."""
    prompts, sampling = mixed_requests()
    run = texts(decode(way.model, prompts, sampling, way.policy))
    order = np.random.default_rng(0).permutation(len(prompts))[:20]
    shuffled = [prompts[i] for i in order], [sampling[i] for i in order]
    assert texts(decode(way.model, *shuffled, way.policy)) == [run[i] for i in order]


def test_gumbel_text_does_not_depend_on_the_order_in_the_batch() -> None:
    prompts, sampling = mixed_requests()
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = [prompts[i] for i in order], [sampling[i] for i in order]
    run = texts(decode(drafting_model(), *shuffled, make_policy(3)))
    assert run == [gumbel_texts()[i] for i in order]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_rounds_per_call_change_neither_tokens_nor_history(coupling: str) -> None:
    policy, model = make_policy(3, "standard", coupling), drafting_model()
    prompts, sampling = mixed_requests(32)
    whole = emissions(advance(model, start(model, prompts, sampling, policy), MOST, policy), 32)
    for rounds in ([1], [3], [2, 7, 1]):
        state = start(model, prompts, sampling, policy)
        seen: list[Emission] = []
        for count in itertools.cycle(rounds):
            state = advance(model, state, count, policy)
            before, seen = seen, emissions(state, 32)
            for old, new in zip(before, seen, strict=False):
                # What was emitted stays; an ended request emits no more.
                assert new.tokens[: len(old.tokens)].tolist() == old.tokens.tolist()
                assert not old.done or len(new.tokens) == len(old.tokens)
            if all(emission.done for emission in seen):
                break
        assert texts(seen) == texts(whole)
        assert [emission.history.tolist() for emission in seen] == [emission.history.tolist() for emission in whole]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize(("stride", "coupling"), [(1, "gumbel"), (3, "gumbel"), (3, "ratio")])
def test_the_mask_token_is_never_emitted_however_likely(stride: int, coupling: str, temperature: float) -> None:
    model = drafting_model(mask_head=30.0)
    prompts = random_prompts(32, seed=2)
    sampling = [SamplingParams(temperature, seed=i, max_tokens=MOST) for i in range(32)]
    policy = make_policy(stride, "standard", coupling)
    state = advance(model, start(model, prompts, sampling, policy), MOST, policy)
    drafts = np.asarray(state.drafts.tokens)
    emitted = texts(emissions(state, 32))
    assert MASK not in drafts
    assert not any(MASK in text for text in emitted)
    # The model does say the mask token: left in, a third of the tokens would be it.
    unfiltered = np.mean([mask_share(model, prompt + text) for prompt, text in zip(prompts, emitted, strict=True)])
    assert unfiltered > 0.3


def mask_share(model: Qwen3, tokens: Sequence[int]) -> float:
    """Share of the rows whose likeliest token is the mask."""
    padded = np.zeros((1, LONGEST + MOST), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(full_forward(model, jnp.asarray(padded), None))[0, : len(tokens)]
    return float((logits.argmax(axis=1) == MASK).mean())


@pytest.mark.parametrize(("stride", "layout"), [(1, "branch"), (3, "standard"), (3, "branch")])
def test_an_ungated_adapter_decodes_the_adapted_model(stride: int, layout: str) -> None:
    model = drafting_model(drafting_adapter(b_scale=0.5))
    prompts, base = greedy_texts()
    expected = naive_ar(model, prompts, 24, adapter_from=0)
    sampling = [SamplingParams(max_tokens=24)] * len(prompts)
    assert texts(decode(model, prompts, sampling, make_policy(stride, layout, gated=False))) == expected
    changed = sum(text != base_text[:24] for text, base_text in zip(expected, base, strict=True))
    assert changed > len(prompts) / 2


def test_a_gated_adapter_decodes_the_base_model_even_by_ar() -> None:
    model = drafting_model(drafting_adapter(b_scale=0.5))
    prompts, expected = greedy_texts()
    assert texts(decode(model, prompts, [SamplingParams(max_tokens=MOST)] * len(prompts), AR)) == expected
