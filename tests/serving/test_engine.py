"""The engine gives every request the text it has alone, whatever is shared, preempted, cancelled, or done by turns."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding import paged
from idlm_jax.decoding.admission import Answer, Request
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.step import Policy
from idlm_jax.errors import UserError
from idlm_jax.serving import engine as engine_module
from idlm_jax.serving import scheduler
from idlm_jax.serving.engine import PagedEngine
from idlm_jax.serving.stride import candidates
from tests.decoding.helpers import (
    AR,
    LONGEST,
    MASK,
    MOST,
    alone,
    drafting_adapter,
    drafting_model,
    full_forward,
    make_policy,
    random_prompts,
    requests_of_all_kinds,
)

CAPACITY = LONGEST + MOST
BRANCH = make_policy(4)
PAGES = 20
SIZES = PagedEngine._sizes
POLICIES = [BRANCH, make_policy(3, "standard", "ratio", gated=False)]


@pytest.fixture(autouse=True)
def small_pages_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several pages, prompts of several chunks, chunks of several prompts; one size of a call to compile."""
    monkeypatch.setattr(PagedEngine, "_sizes", lambda self: iter([self.places]))
    for module in (paged, engine_module):
        monkeypatch.setattr(module, "PAGE", 8)
    monkeypatch.setattr(engine_module, "_FEWEST_PAGES", 2)
    for module, name, value in (
        (scheduler, "SHORTEST_CHUNK", 4),
        (scheduler, "PREFILL_TOKENS", 16),
        (engine_module, "PREFILL_TOKENS", 16),
        (scheduler, "PREFILL_BUDGET", 32),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the size that their requests need, after all."""
    monkeypatch.setattr(PagedEngine, "_sizes", SIZES)


def engine_of(
    policies: Sequence[Policy], pages: int | None = None, model: Qwen3 | None = None, **more: int
) -> PagedEngine:
    model = model or drafting_model(drafting_adapter())
    return PagedEngine(model, policies, places=4, capacity=CAPACITY, pages=pages, **more)


def serve(engine: PagedEngine, requests: Sequence[Request], seed: int = 1) -> Iterator[Answer]:
    """All requests, a few more before each step, in random order."""
    rng = np.random.default_rng(seed)
    coming = [requests[i] for i in rng.permutation(len(requests))]
    while coming or engine.running or engine.waiting:
        count = rng.integers(0, 5)
        engine.submit(coming[:count])
        del coming[:count]
        yield from engine.step()
        engine._scheduler.pages.check()


def preemptions(engine: PagedEngine) -> list[int]:
    """Filled, from now on, with the requests that are put back into the line."""
    waiting, preempted = engine._scheduler._waiting, []

    class Line(type(waiting)):
        def appendleft(self, job) -> None:
            preempted.append(job.request.id)
            super().appendleft(job)

    engine._scheduler._waiting = Line(waiting)
    return preempted


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"N{p.stride}-{p.layout.name}-{p.coupling.name}")
def test_texts_are_those_of_lone_requests(policy: Policy) -> None:
    expected, engine = alone(policy), engine_of([policy])
    finished = [answer for answer in serve(engine, requests_of_all_kinds()) if answer.emission.done]
    assert sorted(answer.request.id for answer in finished) == list(range(len(expected)))
    for answer in finished:
        assert answer.emission.tokens.tolist() == expected[answer.request.id][0]
        assert answer.emission.history.tolist() == expected[answer.request.id][1]
    assert engine.cache_used == 0


@pytest.mark.parametrize("policies", [[BRANCH], [BRANCH, make_policy(4, "standard"), AR]], ids=["fixed", "adaptive"])
def test_texts_stay_the_same_where_pages_are_short_and_requests_are_preempted(policies: list[Policy]) -> None:
    # Four that have just come find room, but not all that they will need.
    expected, engine = alone(BRANCH), engine_of(policies, pages=PAGES)
    cost = np.random.default_rng(3)
    if len(policies) > 1:
        # Whatever a call decodes by.
        engine.strides.choose = lambda requests: policies[cost.integers(len(policies))]
    preempted, texts = preemptions(engine), {}
    engine.submit(requests_of_all_kinds())
    for answer in serve(engine, []):
        known = texts.setdefault(answer.request.id, [])
        tokens = answer.emission.tokens.tolist()
        assert tokens[: len(known)] == known
        texts[answer.request.id] = tokens
    assert texts == {id: tokens for id, (tokens, _) in enumerate(expected)}
    assert len(preempted) > 1
    assert engine._scheduler.pages.available == PAGES - 1


def plain_log_probs(request: Request, tokens: list[int], gated: bool) -> np.ndarray:
    """What a causal pass over prompt and text says in the place of each token: of the base model, or of the adapted."""
    row = np.zeros((1, CAPACITY), np.int32)
    whole = [*request.prompt, *tokens]
    row[0, : len(whole)] = whole
    model = drafting_model() if gated else drafting_model(drafting_adapter())
    logits = np.asarray(full_forward(model, jnp.asarray(row), None if gated else 0), np.float64)
    logits = logits[0, len(request.prompt) - 1 : len(whole) - 1]
    logits[:, MASK] = -np.inf
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("gated", [True, False])
def test_log_probabilities_are_those_of_a_plain_forward_for_whoever_asks(gated: bool) -> None:
    """AR, standard and branch windows by turns, where pages are short; asking changes no text."""
    policies = [BRANCH, make_policy(4, "standard"), AR] if gated else [POLICIES[1]]
    engine, rng = engine_of(policies, pages=PAGES if gated else None), np.random.default_rng(3)
    engine.strides.choose = lambda requests: policies[rng.integers(len(policies))]
    asked = [replace(r, logprobs=(None, 0, None, 3, 20)[r.id % 5]) for r in requests_of_all_kinds()]
    preempted = preemptions(engine)
    engine.submit(asked)
    for answer in serve(engine, []):
        request, said = answer.request, answer.emission
        assert (said.logprobs is None) == (request.logprobs is None)
        if said.logprobs is None or request.logprobs is None:
            continue
        ids, values = np.asarray(said.logprobs.ids), np.asarray(said.logprobs.values)
        assert ids.shape == values.shape == (len(said.tokens), 1 + request.logprobs)
        assert ids[:, 0].tolist() == said.tokens.tolist()
        if not said.done:
            continue
        expected = plain_log_probs(request, said.tokens.tolist(), gated)
        np.testing.assert_allclose(values, np.take_along_axis(expected, ids, axis=1), atol=1e-4)
        likely = -np.sort(-expected, axis=1)[:, : request.logprobs]
        np.testing.assert_allclose(values[:, 1:], likely, atol=1e-4)
        assert all(len(set(row)) == request.logprobs for row in ids[:, 1:].tolist())
        if gated:
            assert said.tokens.tolist() == alone(BRANCH)[request.id][0]
    assert not gated or any(asked[id].logprobs for id in preempted)


def test_log_probabilities_are_computed_where_somebody_asks_alone() -> None:
    engine, sampling = engine_of([AR]), SamplingParams(max_tokens=6)
    for logprobs in (None, 2, None):
        engine.submit([Request(0, [1, 2], sampling), Request(1, [3], sampling, logprobs)])
        engine.step()
        assert engine._last is not None and (engine._last[-1] == []) == (logprobs is None)
        list(serve(engine, []))
    for refused in (21, -1):
        with pytest.raises(UserError, match=f"logprobs must be in 0 … 20, not {refused}"):
            engine.submit([Request(0, [1], sampling, refused)])


def test_an_engine_without_log_probabilities_notes_nothing_for_them() -> None:
    engine = engine_of([AR], most_logprobs=0)
    engine.submit([Request(0, [1, 2], SamplingParams(max_tokens=4))])
    engine.step()
    assert engine._last is not None and engine._last[0].decided is None
    list(serve(engine, []))
    with pytest.raises(UserError, match="keeps no log-probabilities"):
        engine.submit([Request(0, [1], SamplingParams(max_tokens=4), 0)])
    engine.submit([Request(0, [1, 2], SamplingParams(max_tokens=4))])
    assert next(a for a in serve(engine, []) if a.emission.done).emission.tokens.shape == (4,)


def test_no_round_of_a_call_asks_the_host_whether_to_go_on() -> None:
    """A loop without a known end, or a branch for log-probabilities, would have XLA read a value in every round."""
    engine = engine_of([BRANCH])

    def program(noted: int) -> str:
        numbers, trust = np.zeros(1, int), np.zeros(1, bool)
        rounds = partial(paged.run_requests, rounds=4, policy=BRANCH, noted=noted)
        return str(jax.make_jaxpr(lambda state: rounds(engine._model, state, numbers, trust))(engine._state))

    with_notes, without = program(4 * BRANCH.stride), program(0)
    assert "scan[" in with_notes and "while[" not in with_notes
    assert with_notes.count("cond[") == without.count("cond[")


@pytest.mark.parametrize("seed", range(3))
def test_cancelling_frees_places_and_pages_and_changes_no_neighbours_text(seed: int) -> None:
    """Requests are cancelled while they wait, are prefilled, run, have been preempted, or have just ended."""
    rng = np.random.default_rng(seed)
    requests, expected, engine = requests_of_all_kinds(), alone(BRANCH), engine_of([BRANCH], pages=PAGES)
    cancelled, ended = set(), set()
    waiting = list(requests)
    while waiting or engine.running or engine.waiting:
        count = rng.integers(0, 5)
        engine.submit(waiting[:count])
        del waiting[:count]
        here = [request.id for request in requests[: len(requests) - len(waiting)]]
        gone = set(rng.choice(here, rng.integers(0, 3)).tolist()) if here else set()
        engine.cancel(gone)
        cancelled |= gone - ended
        assert engine.running + engine.waiting == len(here) - len(ended | cancelled)
        for answer in engine.step():
            assert answer.request.id not in cancelled
            if answer.emission.done:
                assert answer.emission.tokens.tolist() == expected[answer.request.id][0]
                ended.add(answer.request.id)
        engine._scheduler.pages.check()
    assert ended | cancelled == set(range(len(requests))) and not ended & cancelled
    assert engine.cache_used == 0


def prefilled(engine: PagedEngine) -> list[int]:
    """Filled, from now on, with the number of prompt tokens of each prefill call."""
    counts, prefill = [], engine._prefill

    def count(size: int, chunks) -> None:
        counts.append(sum(len(chunk.tokens) for chunk in chunks))
        prefill(size, chunks)

    engine._prefill = count
    return counts


def test_a_shared_beginning_is_computed_once_and_changes_no_text() -> None:
    common, own = random_prompts(2, seed=9)[1][:17], random_prompts(8, seed=10)
    prompts = [[*common, *prompt][:LONGEST] for prompt in own]
    requests = [Request(i, p, SamplingParams(1.0, seed=i, max_tokens=20)) for i, p in enumerate(prompts)]
    lone = {}
    for request in requests:
        lone |= {a.request.id: a.emission.tokens.tolist() for a in serve(engine_of([BRANCH]), [request])}
    engine = engine_of([BRANCH])
    counts = prefilled(engine)
    texts = {a.request.id: a.emission.tokens.tolist() for a in serve(engine, requests[:1])}
    assert sum(counts) == len(prompts[0]) - 1
    counts.clear()
    texts |= {a.request.id: a.emission.tokens.tolist() for a in serve(engine, requests[1:])}
    # Two pages of 8 tokens each are there.
    assert sum(counts) == sum(len(prompt) - 1 - 16 for prompt in prompts[1:])
    assert texts == lone


def test_a_long_prompt_does_not_stop_those_that_are_being_decoded() -> None:
    # By the first, where no cost is known.
    engine = engine_of([AR, BRANCH])
    engine.submit([Request(0, [1], SamplingParams(max_tokens=40))])
    engine.step()
    counts = prefilled(engine)
    # Of 19 tokens that are stored, at most 32 of all together come before a call of rounds.
    engine.submit([Request(i, [i] * LONGEST, SamplingParams(max_tokens=1)) for i in range(1, 4)])
    lengths = [len(a.emission.tokens) for _ in range(3) for a in engine.step() if a.request.id == 0]
    assert lengths == [4, 8, 12]
    assert sum(counts) == 3 * (LONGEST - 1) and max(counts) <= 16 and len(counts) > 3


@pytest.mark.usefixtures("every_size")
def test_warming_up_leaves_nothing_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    engine, lines = engine_of(candidates(make_policy(2))), []
    engine.warm_up(lines.append)
    assert re.fullmatch(r"compiling \d+ programs", lines[0]) and lines[-1].startswith("ready after")
    assert any("AR: " in line for line in lines) and any("N = 2 standard: " in line for line in lines)
    with jax.log_compiles():
        asked = [replace(request, logprobs=3 if request.id % 2 else None) for request in requests_of_all_kinds()]
        texts = {a.request.id: a.emission.tokens.tolist() for a in serve(engine, asked)}
    assert not [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert texts == {id: tokens for id, (tokens, _) in enumerate(alone(BRANCH))}


def test_a_request_that_asks_for_more_than_there_is_is_refused_before_it_waits() -> None:
    engine = engine_of([AR, BRANCH], pages=11)
    with pytest.raises(UserError, match=r"prompt \(20 tokens\) \+ max_tokens \(41\) exceeds the 60 tokens"):
        engine.submit([Request(0, [1] * 20, SamplingParams(max_tokens=41))])
    assert not engine.running and not engine.waiting
    # It just has room for one of full length.
    engine.submit([Request(i, [1] * 20, SamplingParams(max_tokens=40)) for i in range(3)])
    assert {a.request.id for a in serve(engine, [])} == set(range(3))


def test_a_cache_in_which_the_longest_text_finds_no_room_is_refused_at_once() -> None:
    # A window of one row: 59 slots are 8 pages, and one page is nobody's.
    with pytest.raises(UserError) as refused:
        engine_of([AR], pages=8)
    page = 2 * 2 * 2 * 8 * 8 * 4 / 1e9
    assert str(refused.value) == (
        f"a text of 60 tokens needs a cache of {9 * page:.3g} GB, and there are {8 * page:.3g} GB: lower --max-length "
        "to 57 or raise --cache-gb"
    )
    PagedEngine(drafting_model(), [AR], 4, capacity=57, pages=8)
    with pytest.raises(UserError, match="to 58 or raise"):
        engine_of([BRANCH], pages=10)
    with pytest.raises(UserError, match=r"are 4.1e-06 GB: raise --cache-gb"):
        engine_of([BRANCH], pages=2)


def test_outcomes_that_are_thrown_away_teach_nothing() -> None:
    """Whoever was preempted decodes the same positions with the same noise again: the way must not depend on it."""
    engine, learnt = engine_of([BRANCH], pages=PAGES), []
    preempted = preemptions(engine)
    observe = engine.strides.observe
    engine.strides.observe = lambda policy, history: learnt.extend(history.ravel().tolist()) or observe(policy, history)
    engine.submit(requests_of_all_kinds())
    ended = {a.request.id: a.emission.history for a in serve(engine, []) if a.emission.done}
    known = np.concatenate(list(ended.values()))
    assert preempted and sum(outcome >= 0 for outcome in learnt) == np.sum(known >= 0)


def test_drafts_of_a_smaller_stride_are_not_verified_by_a_larger_one() -> None:
    """After a call of stride 2, a call of stride 4 begins cold; after one of stride 4, stride 2 goes on."""
    two, four = make_policy(2), make_policy(4)
    engine = engine_of([AR, four, two])
    order = iter([four, two, four, two])
    engine.strides.choose = lambda requests: next(order)
    engine.submit([Request(0, [1, 2], SamplingParams(max_tokens=MOST))])
    emissions = [answer.emission.history.tolist() for _ in range(4) for answer in engine.step()]
    history = emissions[-1]
    assert history[0] == -1 and min(history[1:8]) >= 0 and history[8] == -1
    assert max(history[4:8]) <= 1


def test_rounds_are_counted_by_policy_and_those_of_ar_verify_nothing() -> None:
    four = make_policy(4)
    engine = engine_of([AR, four])
    order = iter([AR, four, AR, AR])
    engine.strides.choose = lambda requests: next(order)
    engine.submit([Request(0, [1, 2], SamplingParams(max_tokens=MOST))])
    histories = [answer.emission.history.tolist() for _ in range(4) for answer in engine.step()]
    assert engine.take_rounds() == {"AR": 8, "N = 4 branch": 4} and not engine.take_rounds()
    assert histories[-1][:5] == [-1] * 5 and min(histories[-1][5:8]) >= 0 and histories[-1][8:] == [-1] * 4


def test_pages_are_as_many_as_the_device_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, policy = drafting_model(), make_policy(4)
    page = sum(array.nbytes for array in jax.tree.leaves(paged.idle_paged_state(model, policy, 1, 1, 1, 1, 1).cache))
    device = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": 30 * page, "bytes_in_use": 10 * page}})
    monkeypatch.setattr(engine_module.jax, "local_devices", lambda: [device()])
    assert engine_of([policy], model=model)._state.cache[0][0].shape[0] == 17
    assert jnp.float32 == model.dtype
    assert engine_of([policy], pages=20, model=model)._state.cache[0][0].shape[0] == 20
    with pytest.raises(UserError, match=r"a cache of 4.3e-05 GB does not fit into the 4.1e-05 GB that the device has"):
        engine_of([policy], pages=21, model=model)


def test_the_fullest_device_of_a_mesh_says_how_many_pages_there_can_be() -> None:
    def device(in_use: int) -> Any:
        return SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": in_use})

    # Two copies of the model hold all pages, each device its key heads of them.
    mesh = SimpleNamespace(devices=np.array([[device(10), device(30)], [device(20), device(0)]]), shape={"tp": 2})
    assert engine_module._free_memory(cast("Qwen3", SimpleNamespace(mesh=mesh))) == 2 * 70
