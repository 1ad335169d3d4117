"""A continuous batch gives every request the text it has alone, whoever sat in its slot before or sits beside it."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from idlm_jax.decoding import generate, refill
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.refill import MOST_END_TOKENS, Answer, Pool, Request, SlotBatch
from idlm_jax.decoding.step import Policy
from idlm_jax.errors import UserError
from tests.decoding.helpers import (
    AR,
    LONGEST,
    MASK,
    MOST,
    VOCAB,
    decode,
    drafting_adapter,
    drafting_model,
    make_policy,
    random_prompts,
)

CAPACITY = LONGEST + MOST
# Few and small places: most requests must move, some twice, and some wait for a place to move to.
POOLS = (Pool(2, 16), Pool(1, 32), Pool(1, CAPACITY))
POLICIES = [AR, make_policy(4), make_policy(4, "standard", "ratio")]


def requests_of_all_kinds(count: int = 31) -> list[Request]:
    """Greedy and sampled, filtered or not, short and long, with end tokens or without; some prompts occur twice."""
    prompts = random_prompts(count, seed=3)
    prompts[5] = prompts[4]
    prompts[count - 2] = prompts[2]
    kinds = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 7, 1.0), (1.0, 0, 0.9))
    rng = np.random.default_rng(4)
    requests = []
    for i, prompt in enumerate(prompts):
        temperature, top_k, top_p = kinds[i % len(kinds)]
        ends = tuple(rng.integers(0, MASK, i % 3).tolist())
        most = int(rng.integers(1, MOST + 1))
        requests.append(Request(i, prompt, SamplingParams(temperature, top_k, top_p, 100 + i, most, (), ends)))
    return requests


@cache
def alone(policy: Policy) -> list[tuple[list[int], list[int]]]:
    """The texts of ``requests_of_all_kinds`` by one static batch, and how many drafts each round accepted."""
    requests = requests_of_all_kinds()
    prompts, sampling = [r.prompt for r in requests], [r.sampling for r in requests]
    run = decode(drafting_model(drafting_adapter()), prompts, sampling, policy)
    return [(emission.tokens.tolist(), emission.history.tolist()) for emission in run]


def drain(batch: SlotBatch, requests: Sequence[Request], rounds: int, at_once: int) -> Iterator[Answer]:
    """All requests through a batch, at most ``at_once`` more before each call."""
    waiting = list(requests)
    while waiting or batch.busy:
        batch.submit(waiting[:at_once])
        del waiting[:at_once]
        yield from batch.run(rounds)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"N{p.stride}-{p.layout.name}-{p.coupling.name}")
def test_texts_do_not_depend_on_places_moves_refilling_or_neighbours(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prompts of 20 tokens take three chunks of prefill.
    monkeypatch.setattr(refill, "SHORT_PROMPT", 4)
    for module in (refill, generate):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 8)
    moves = []
    move = refill._move
    monkeypatch.setattr(refill, "_move", lambda state, pool, *places: moves.append(pool) or move(state, pool, *places))
    requests = requests_of_all_kinds()
    batch = SlotBatch(drafting_model(drafting_adapter()), policy, POOLS)
    order = np.random.default_rng(1).permutation(len(requests))
    finished = list(drain(batch, [requests[i] for i in order], rounds=5, at_once=3))
    assert sorted(done.request.id for done in finished) == list(range(len(requests)))
    assert moves.count(0) > 10 and moves.count(1) > 3
    expected = alone(policy)
    for done in finished:
        tokens, history = expected[done.request.id]
        assert done.emission.tokens.tolist() == tokens
        # Drafts are those of this request alone, too, also where it has waited or moved.
        assert done.emission.history.tolist() == history
        assert done.emission.done


def test_steps_show_how_far_requests_are_and_their_last_is_what_run_returns() -> None:
    requests, expected = requests_of_all_kinds(), alone(POLICIES[1])
    batch = SlotBatch(drafting_model(drafting_adapter()), POLICIES[1], POOLS)
    batch.submit(requests)
    seen: dict[int, list[list[int]]] = {}
    ended = []
    while batch.busy:
        for answer in batch.step(2):
            seen.setdefault(answer.request.id, []).append(answer.emission.tokens.tolist())
            assert answer.request.id not in ended
            ended += [answer.request.id] if answer.emission.done else []
    assert sorted(ended) == list(range(len(requests)))
    for id, steps in seen.items():
        assert steps[-1] == expected[id][0]
        assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(steps))
    assert sum(map(len, seen.values())) > 3 * len(requests)


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_frees_places_and_changes_no_neighbours_text(seed: int) -> None:
    """Requests come and are cancelled at random, while they wait, run, have filled a place, or have just ended."""
    rng = np.random.default_rng(seed)
    requests, expected = requests_of_all_kinds(), alone(POLICIES[1])
    batch = SlotBatch(drafting_model(drafting_adapter()), POLICIES[1], POOLS)
    waiting, cancelled, ended = list(requests), set(), set()
    while waiting or batch.busy:
        come = rng.integers(0, 5)
        batch.submit(waiting[:come])
        del waiting[:come]
        here = [request.id for request in requests[: len(requests) - len(waiting)]]
        gone = set(rng.choice(here, rng.integers(0, 3)).tolist()) if here else set()
        batch.cancel(gone)
        cancelled |= gone - ended
        assert batch.running + batch.waiting == len(here) - len(ended | cancelled)
        for answer in batch.step(3):
            assert answer.request.id not in cancelled
            if answer.emission.done:
                assert answer.emission.tokens.tolist() == expected[answer.request.id][0]
                assert answer.emission.history.tolist() == expected[answer.request.id][1]
                ended.add(answer.request.id)
    assert ended | cancelled == set(range(len(requests))) and not ended & cancelled
    assert batch.room == len(batch._owners) and not batch._full


def test_requests_that_cannot_run_are_refused_before_they_wait() -> None:
    batch = SlotBatch(drafting_model(), AR, POOLS)
    ends = tuple(range(MOST_END_TOKENS + 1))
    for request, message in (
        (
            Request(0, [1] * 20, SamplingParams(max_tokens=MOST + 1)),
            r"prompt \(20 tokens\) \+ max_tokens \(41\) exceeds",
        ),
        (Request(0, [], SamplingParams()), "the prompt is empty"),
        (Request(0, [1], SamplingParams(stop_token_ids=(VOCAB,))), "stop token outside the vocabulary of 64"),
        (Request(0, [1], SamplingParams(top_k=2**31)), r"top_k must be positive and below 2\^31"),
        (Request(0, [1], SamplingParams(max_tokens=9, stop_token_ids=ends)), "at most 8 tokens can end a text"),
    ):
        with pytest.raises(UserError, match=message):
            batch.submit([request])
    assert not batch.busy and batch.room == 4
    batch.submit([Request(i, [1], SamplingParams(max_tokens=1)) for i in range(6)])
    assert batch.busy and batch.room == 0


def test_prompts_that_requests_share_are_prefilled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled = []
    monkeypatch.setattr(refill, "prefill", lambda model, cache, tokens, policy: prefilled.append(tokens) or cache)
    batch = SlotBatch(drafting_model(), AR, POOLS)
    batch.submit([Request(i, prompt, SamplingParams(max_tokens=2)) for i, prompt in enumerate([[1, 2], [3], [1, 2]])])
    batch._admit()
    assert [tokens[:2, 0].tolist() for tokens in prefilled] == [[1, 0]]
    assert batch.room == 1
