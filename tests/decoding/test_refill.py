"""A continuous batch gives every request the text it has alone, whoever sat in its slot before or sits beside it."""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest

from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.refill import MOST_END_TOKENS, Finished, Pool, Request, SlotBatch
from idlm_jax.decoding.step import Policy
from idlm_jax.errors import UserError
from tests.decoding.helpers import (
    AR,
    LONGEST,
    MASK,
    MOST,
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
def alone(policy: Policy) -> list[list[int]]:
    """The texts of ``requests_of_all_kinds`` by one static batch."""
    requests = requests_of_all_kinds()
    prompts, sampling = [r.prompt for r in requests], [r.sampling for r in requests]
    run = decode(drafting_model(drafting_adapter()), prompts, sampling, policy)
    return [emission.tokens.tolist() for emission in run]


def drain(batch: SlotBatch, requests: Sequence[Request], rounds: int, at_once: int) -> Iterator[Finished]:
    """All requests through a batch, at most ``at_once`` more before each call."""
    waiting = list(requests)
    while waiting or batch.busy:
        batch.submit(waiting[:at_once])
        del waiting[:at_once]
        yield from batch.run(rounds)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"N{p.stride}-{p.layout.name}-{p.coupling.name}")
def test_texts_do_not_depend_on_places_moves_refilling_or_neighbours(policy: Policy) -> None:
    requests = requests_of_all_kinds()
    batch = SlotBatch(drafting_model(drafting_adapter()), policy, POOLS)
    order = np.random.default_rng(1).permutation(len(requests))
    finished = list(drain(batch, [requests[i] for i in order], rounds=5, at_once=3))
    assert sorted(done.request.id for done in finished) == list(range(len(requests)))
    expected = alone(policy)
    assert [done.emission.tokens.tolist() for done in finished] == [expected[done.request.id] for done in finished]
    for done in finished:
        # The history is that of this request alone: its rounds emitted what it emitted, the last one maybe cut.
        emitted = np.maximum(done.emission.history, 0) + 1
        assert emitted[:-1].sum() < len(done.emission.tokens) <= emitted.sum()
        assert done.emission.done
