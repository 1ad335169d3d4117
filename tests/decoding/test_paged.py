"""A cache in pages gives every request the text of a dense one, whatever else lies in the pages and whoever waits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.decoding import paged
from idlm_jax.decoding.cache import BIN, init_cache, load_pages, store_pages, write_rows
from idlm_jax.decoding.generate import Emission, SamplingParams, advance, emissions, prefill, start
from idlm_jax.decoding.paged import give_pages, idle_paged_state
from idlm_jax.decoding.step import DecodeState, Policy, running
from idlm_jax.decoding.window import window_rows
from idlm_jax.serving.pages import Pages
from tests.decoding.helpers import AR, LONGEST, MASK, MOST, drafting_adapter, drafting_model, make_policy, texts
from tests.decoding.helpers import random_prompts as prompts_of

BATCH, PAGE = 8, 8
POLICIES = [
    AR,
    make_policy(4),
    make_policy(4, "standard"),
    make_policy(3, "standard", "ratio"),
    make_policy(3, "branch", "ratio"),
    make_policy(4, gated=False),
]
every_policy = pytest.mark.parametrize(
    "policy", POLICIES, ids=lambda p: f"N{p.stride}-{p.layout.name}-{p.coupling.name}-{'gated' if p.gated else 'full'}"
)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several pages, and windows over two of them and more."""
    monkeypatch.setattr(paged, "PAGE", PAGE)


def sampling_of_all_kinds(count: int) -> list[SamplingParams]:
    """Greedy and sampled, filtered or not, long and short; the last asks for MOST tokens."""
    kinds = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 7, 1.0), (1.0, 0, 0.9))
    most = np.random.default_rng(5).integers(1, MOST + 1, count)
    most[-1] = MOST
    return [SamplingParams(*kinds[i % 4], seed=100 + i, max_tokens=int(m)) for i, m in enumerate(most)]


def table_of(pages: Pages, requests: Sequence[int], width: int) -> np.ndarray:
    """What the device is told about some requests; the rest of BATCH rows is about nobody."""
    table = np.full((BATCH, width), BIN, np.int32)
    for row, request in zip(table, requests, strict=False):
        row[: len(pages.of(request))] = pages.of(request)
    return table


def in_pages(model, policy: Policy, dense: DecodeState, pages: Pages, width: int) -> DecodeState:
    """A state after prefill, its keys moved to pages; all that is left over is NaN, the bin too."""
    batch = len(dense.done)
    idle = idle_paged_state(model, policy, batch, pages.most + 1, width, dense.tokens.shape[1], dense.eos.shape[1])
    poisoned = jax.tree.map(partial(jnp.full_like, fill_value=jnp.nan), idle.cache)
    table = table_of(pages, range(batch), width)
    cache = store_pages(poisoned, dense.cache, np.arange(batch), table)
    length = np.asarray(dense.length)

    def poison_padding(array: jax.Array) -> jax.Array:
        array = np.array(array)
        for b, row in enumerate(table):
            array[row[-(-length[b] // PAGE) :]] = np.nan
            array[row[length[b] // PAGE], :, length[b] % PAGE :] = np.nan
        array[BIN] = np.nan
        return jnp.asarray(array)

    state = replace(dense, cache=jax.tree.map(poison_padding, cache), slots=idle.slots, pages=idle.pages)
    return give_pages(state, np.arange(batch), table)


def waiting(state: DecodeState, policy: Policy) -> list[int]:
    return np.flatnonzero(~np.asarray(state.done) & ~np.asarray(running(state, policy))).tolist()


def decode_in_pages(model, prompts, sampling, policy: Policy, pages: Pages) -> tuple[list[Emission], int]:
    """Rounds by a few a call, with pages given late and taken back as soon as a request ends; counts late ones."""
    rows, rng = window_rows(policy.layout, policy.stride), np.random.default_rng(6)
    most = pages.pages_for(LONGEST + MOST + rows)
    for i, prompt in enumerate(prompts):
        assert pages.begin(i, prompt[:-1], pages.pages_for(len(prompt) + i % 3 * rows), "base") == 0
    state = in_pages(model, policy, start(model, prompts, sampling, policy), pages, most)
    ended, late = set(), 0
    while len(ended) < len(prompts):
        state = advance(model, state, int(rng.integers(1, 4)), policy)
        for i in set(np.flatnonzero(np.asarray(state.done)).tolist()) - ended:
            pages.release(i)  # the state names them still, and others get them
            ended.add(i)
        given = []
        for order, i in enumerate(waiting(state, policy)):
            # The first gets what it needs; the others now and then, as long as the first will find enough.
            if (order == 0 or (rng.random() < 0.5 and pages.available > most)) and pages.extend(i, 1):
                given.append(i)
            else:
                late += 1
        pages.check()
        nobody = [BATCH] * (BATCH - len(given))
        state = give_pages(state, np.array([*given, *nobody], np.int32), table_of(pages, given, most))
    return emissions(state, len(prompts)), late


@every_policy
def test_texts_are_those_of_a_dense_cache_also_of_requests_that_wait_for_pages(policy: Policy) -> None:
    model, prompts, sampling = drafting_model(drafting_adapter()), prompts_of(BATCH, seed=8), sampling_of_all_kinds(BATCH)
    expected = emissions(advance(model, start(model, prompts, sampling, policy), MOST, policy), BATCH)
    # Fewer than all of them together fill.
    ours, late = decode_in_pages(model, prompts, sampling, policy, Pages(1 + 52, PAGE))
    assert texts(ours) == texts(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one.history, other.history)
    assert late > 5
