"""A cache in pages gives every request the text of a dense one, whatever else lies in the pages and whoever waits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.decoding import paged
from idlm_jax.decoding.cache import BIN, Cache
from idlm_jax.decoding.generate import Emission, SamplingParams, advance, emissions, start
from idlm_jax.decoding.paged import give_pages, idle_paged_state, prefill_pages
from idlm_jax.decoding.step import DecodeState, Policy, running
from idlm_jax.decoding.window import window_rows
from idlm_jax.serving.pages import Pages
from tests.decoding.helpers import (
    AR,
    LONGEST,
    MOST,
    copied_to_pages,
    drafting_adapter,
    drafting_model,
    make_policy,
    texts,
)
from tests.decoding.helpers import random_prompts as prompts_of

BATCH, PAGE = 8, 8
POLICIES = [
    AR,
    make_policy(4),
    make_policy(4, "standard", "ratio"),
    make_policy(3, "branch", "ratio", gated=False),
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


def without_pages(dense: DecodeState, policy: Policy, pages: Pages, width: int) -> DecodeState:
    """A prefilled state whose requests have no pages yet; all that pages and the bin hold is NaN."""
    batch, room = dense.tokens.shape
    idle = idle_paged_state(drafting_model(), policy, batch, pages.most + 1, width, room, dense.eos.shape[1])
    poisoned = jax.tree.map(partial(jnp.full_like, fill_value=jnp.nan), idle.cache)
    return replace(dense, cache=poisoned, slots=idle.slots, pages=idle.pages)


def in_pages(policy: Policy, dense: DecodeState, pages: Pages, width: int) -> DecodeState:
    """A prefilled state, its keys moved to pages, and NaN left after them."""
    state, table, length = (
        without_pages(dense, policy, pages, width),
        table_of(pages, range(BATCH), width),
        dense.length,
    )
    stored_BS = jnp.arange(dense.cache[0][0].shape[2]) < length[:, None]
    keys = jax.tree.map(lambda array: jnp.where(stored_BS[:, None, :, None], array, jnp.nan), dense.cache)
    state = replace(state, cache=copied_to_pages(state.cache, keys, table))
    return give_pages(state, jnp.arange(BATCH), table)


def waiting(state: DecodeState, policy: Policy) -> list[int]:
    return np.flatnonzero(~np.asarray(state.done) & ~np.asarray(running(state, policy))).tolist()


def decode_in_pages(model, prompts, sampling, policy: Policy, pages: Pages) -> tuple[list[Emission], int]:
    """Rounds by a few a call, with pages given late and taken back as soon as a request ends; counts late ones."""
    rows, rng = window_rows(policy.layout, policy.stride), np.random.default_rng(6)
    most = pages.pages_for(LONGEST + MOST + rows)
    for i, prompt in enumerate(prompts):
        assert pages.begin(i, prompt[:-1], pages.pages_for(len(prompt) + i % 3 * rows)) == 0
    state = in_pages(policy, start(model, prompts, sampling, policy), pages, most)
    ended, late = set(), 0
    while len(ended) < len(prompts):
        state = advance(model, state, int(rng.integers(1, 4)), policy)
        for i in set(np.flatnonzero(np.asarray(state.done)).tolist()) - ended:
            pages.release(i)  # the state names them still, and others get them
            ended.add(i)
        extended = []
        for order, i in enumerate(waiting(state, policy)):
            # The first gets what it needs; the others now and then, as long as the first will find enough.
            if (order == 0 or (rng.random() < 0.5 and pages.available > most)) and pages.extend(i, 1):
                extended.append(i)
            else:
                late += 1
        pages.check()
        nobody = [BATCH] * (BATCH - len(extended))
        state = give_pages(state, np.array([*extended, *nobody], np.int32), table_of(pages, extended, most))
    return emissions(state, len(prompts)), late


@every_policy
def test_texts_are_those_of_a_dense_cache_also_of_requests_that_wait_for_pages(policy: Policy) -> None:
    model, prompts, sampling = (
        drafting_model(drafting_adapter()),
        prompts_of(BATCH, seed=8),
        sampling_of_all_kinds(BATCH),
    )
    expected = emissions(advance(model, start(model, prompts, sampling, policy), MOST, policy), BATCH)
    # Fewer than all of them together fill.
    ours, late = decode_in_pages(model, prompts, sampling, policy, Pages(1 + 52, PAGE))
    assert texts(ours) == texts(expected)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(one.history, other.history)
    assert late > 5


def of_cache(state: DecodeState) -> np.ndarray:
    """All there is: [layer and kind, page, head, slot, head_dim]."""
    return np.stack(jax.tree.leaves(state.cache))


def test_a_round_writes_to_the_window_of_requests_that_run_and_to_the_bin_alone() -> None:
    model, policy, pages = drafting_model(drafting_adapter()), make_policy(4), Pages(1 + 52, PAGE)
    prompts, rows = prompts_of(BATCH, seed=8), window_rows(policy.layout, policy.stride)
    ended, waits = {1, 4}, {2, 7}
    for i, prompt in enumerate(prompts):
        # Two that wait have room for all but one row.
        slots = len(prompt) - 1 + rows if i not in waits else (len(prompt) - 2 + rows) // PAGE * PAGE
        pages.begin(i, prompt[:-1], pages.pages_for(slots))
    most = pages.pages_for(LONGEST + MOST + rows)
    dense = start(model, prompts, sampling_of_all_kinds(BATCH), policy)
    state = in_pages(policy, dense, pages, most)
    state = replace(state, done=state.done.at[jnp.array(sorted(ended))].set(True))
    assert set(waiting(state, policy)) == waits
    before, length = of_cache(state), np.asarray(state.length)
    after = of_cache(advance(model, state, 1, policy))
    written = np.any(before.view(np.int32) != after.view(np.int32), axis=(0, 2, 4))
    expected = np.zeros_like(written)
    for i in set(range(BATCH)) - ended - waits:
        for slot in range(length[i], length[i] + rows):
            expected[pages.of(i)[slot // PAGE], slot % PAGE] = True
    np.testing.assert_array_equal(written[BIN + 1 :], expected[BIN + 1 :])
    assert written[BIN].all()
    assert np.isfinite(after[:, expected.nonzero()[0], :, expected.nonzero()[1]]).all()


def test_a_prefix_that_pages_hold_need_not_be_prefilled_again() -> None:
    model, policy, pages = drafting_model(drafting_adapter()), make_policy(4), Pages(1 + 80, PAGE)
    prefix = prompts_of(2, seed=9)[1][:17]
    own = prompts_of(BATCH, seed=10)
    # Prompts that share two pages, one that is all of them, and one that shares nothing.
    prompts = [[*prefix, i, i + 1][: LONGEST if i else 17] for i in range(BATCH - 1)] + [own[-1]]
    dense = start(model, prompts, sampling_of_all_kinds(BATCH), policy)
    expected = texts(emissions(advance(model, jax.tree.map(jnp.copy, dense), MOST, policy), BATCH))
    most = pages.pages_for(LONGEST + MOST + 16)
    state = without_pages(dense, policy, pages, most)

    def stored(cache: Cache, begun: np.ndarray, requests: range) -> Cache:
        """What the prompts of some requests hold from a slot on; the others' tables are empty."""
        left = np.zeros((BATCH, LONGEST), np.int32)
        for i in requests:
            left[i, : len(prompts[i]) - 1 - begun[i]] = prompts[i][begun[i] : -1]
        own = np.where(np.isin(np.arange(BATCH), requests)[:, None], table_of(pages, range(len(begun)), most), BIN)
        tables = np.pad(own, ((0, 0), (0, 1)), constant_values=BIN)
        return prefill_pages(model, cache, left, np.resize(begun, BATCH), tables, None, "auto")

    reused = [pages.begin(0, prompts[0][:-1], most)]
    # The bin is NaN still, and padding is written there.
    cache = stored(state.cache, np.array([0], np.int32), range(1))
    pages.publish(0, prompts[0][:-1])
    reused += [pages.begin(i, prompts[i][:-1], most) for i in range(1, BATCH)]
    assert reused == [0, *[2] * (BATCH - 2), 0]
    cache = stored(cache, PAGE * np.array(reused, np.int32), range(1, BATCH))
    state = give_pages(replace(state, cache=cache), jnp.arange(BATCH), table_of(pages, range(BATCH), most))
    shared = of_cache(state)[:, list(pages.of(0)[:2])]
    state = advance(model, state, MOST, policy)
    assert texts(emissions(state, BATCH)) == expected
    np.testing.assert_array_equal(of_cache(state)[:, list(pages.of(0)[:2])], shared)
