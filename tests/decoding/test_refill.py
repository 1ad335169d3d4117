"""A continuous batch gives every request the text it has alone, whoever sat in its slot before or sits beside it."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from idlm_jax.decoding import generate, refill
from idlm_jax.decoding.admission import MOST_END_TOKENS, Answer, Request
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.refill import Pool, SlotBatch
from idlm_jax.decoding.step import Policy
from idlm_jax.errors import UserError
from tests.decoding.helpers import (
    AR,
    LONGEST,
    MOST,
    alone,
    drafting_adapter,
    drafting_model,
    make_policy,
    requests_of_all_kinds,
)

CAPACITY = LONGEST + MOST
# Few and small places: most requests must move, some twice, and some wait for a place to move to.
POOLS = (Pool(2, 16), Pool(1, 32), Pool(1, CAPACITY))
POLICIES = [AR, make_policy(4), make_policy(4, "standard", "ratio")]


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


def test_requests_that_cannot_run_are_refused_before_they_wait() -> None:
    batch = SlotBatch(drafting_model(), AR, POOLS)
    ends = tuple(range(MOST_END_TOKENS + 1))
    for request, message in (
        (
            Request(0, [1] * 20, SamplingParams(max_tokens=MOST + 1)),
            r"prompt \(20 tokens\) \+ max_tokens \(41\) exceeds",
        ),
        (Request(0, [], SamplingParams()), "the prompt is empty"),
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
