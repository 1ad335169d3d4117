"""Two thousand requests, many of them cut off or wrong: the others have their texts, and nothing is left of any."""

import asyncio
import gc
import json
import random
from collections import Counter
from functools import cache
from typing import Any

import psutil
import pytest
from fastapi import FastAPI

from idlm_jax import SamplingParams
from idlm_jax.decoding import paged
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.serving import engine as engine_module
from idlm_jax.serving.engine import PagedEngine
from idlm_jax.serving.scheduler import Scheduler
from tests.serving.support import Client, serving, tiny, wait_for

STRIDE, PLACES, DISTINCT, REQUESTS, AT_ONCE = 3, 8, 48, 2000, 24
# Hardly two texts of full length.
PAGE, PAGES = 8, 24
# Two allocations of 2 kB a request would be more.
MOST_GROWTH = 6 * 2**20


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pages, so that texts have several; one size of a call and one of tables."""
    for module in (paged, engine_module):
        monkeypatch.setattr(module, "PAGE", PAGE)
    monkeypatch.setattr(engine_module, "_FEWEST_PAGES", 17)
    monkeypatch.setattr(PagedEngine, "_sizes", lambda self: iter([PLACES]))


@cache
def good_requests() -> list[tuple[str, dict[str, Any], str, str]]:
    """Different requests: path, body, and the text and the reason of its end that ``generate`` gives."""
    rng = random.Random(1)
    paths, bodies, prompts, sampling = [], [], [], []
    for number in range(DISTINCT):
        words = "".join(rng.choices("ab 12", k=rng.randint(1, 40)))
        prompt = words if number % 2 else [{"role": "user", "content": words}]
        how: dict[str, Any] = {"temperature": (0.0, 1.0, 0.8)[number % 3], "max_tokens": rng.choice([1, 16, 40, 40])}
        how |= {"top_p": 0.9} if number % 4 == 0 else {}
        how |= {"top_k": 20} if number % 5 == 0 else {}
        how |= {"stop": ("e", "1")} if number % 6 == 0 else {}
        how |= {"ignore_eos": True} if number % 4 else {}
        paths.append("/v1/completions" if number % 2 else "/v1/chat/completions")
        bodies.append({"model": "tiny", "prompt" if number % 2 else "messages": prompt, "seed": number, **how})
        prompts.append(prompt)
        sampling.append(SamplingParams(seed=number, **how))
    answers = tiny().generate(prompts, sampling, stride=1)
    ends = [(answer.text, str(answer.finish_reason)) for answer in answers]
    return [(path, body, *end) for path, body, end in zip(paths, bodies, ends, strict=True)]


def said(received: str) -> tuple[str, str]:
    """The text of a whole or a streamed answer, of either path, and why it ended."""
    if received.startswith("data: "):
        assert received.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in received.splitlines() if line.startswith("data: {")]
    else:
        events = [json.loads(received)]
    choices = [choice for event in events for choice in event["choices"]]
    parts = [
        choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") for choice in choices
    ]
    return "".join(part or "" for part in parts), choices[-1]["finish_reason"]


async def behave(app: FastAPI, number: int) -> str:
    """One request: good, garbage, or of a client that goes away; says which."""
    rng = random.Random(number)
    path, body, text, reason = good_requests()[rng.randrange(DISTINCT)]
    body = {**body, "stream": rng.random() < 0.5}
    kind = rng.choices(["good", "gone", "garbage"], [75, 20, 5])[0]
    if kind == "good":
        client = Client(app, body, path)
        await client.ask()
        assert client.status == 200 and said(client.received.decode()) == (text, reason)
    elif kind == "garbage":
        wrong = [{"n": -1}, {"stop": [1]}, {"temperature": "hot"}, {"max_tokens": 1000}, {"top_p": 0}, {"model": 1}]
        bad = [b"{", b"\xff\xfe", b"[]", *(json.dumps(body | change).encode() for change in wrong)]
        client = Client(app, rng.choice(bad), path)
        await client.ask()
        assert client.status in (400, 422) and "error" in json.loads(client.received)
    else:
        client = Client(app, body | {"max_tokens": 40, "ignore_eos": True, "stop": []}, path)
        asked = asyncio.create_task(client.ask())
        await asyncio.sleep(rng.random() * 0.1)
        client.gone.set()
        await asked
    return kind


async def ask_all(app: FastAPI, numbers: range) -> Counter[str]:
    """So many at once, and the next as soon as one has ended."""
    coming, kinds = iter(numbers), Counter[str]()

    async def one_after_the_other() -> None:
        for number in coming:
            kinds[await behave(app, number)] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(one_after_the_other())
    return kinds


@pytest.mark.usefixtures("few_programs")
def test_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    good_requests()
    preempted, grow = [], Scheduler._grow

    def count_preempted(scheduler: Scheduler, plan: Any) -> None:
        waiting = scheduler.waiting
        grow(scheduler, plan)
        preempted.append(scheduler.waiting - waiting)

    monkeypatch.setattr(Scheduler, "_grow", count_preempted)
    policy = DecodeConfig(stride=STRIDE, layout="standard").policy()
    engine = PagedEngine(tiny().model, [policy], PLACES, 128, PAGES)
    with serving(lambda: engine, STRIDE, most_waiting=AT_ONCE) as (service, app):
        kinds, memory = Counter[str](), []
        for part in range(4):
            kinds += asyncio.run(ask_all(app, range(REQUESTS * part // 4, REQUESTS * (part + 1) // 4)))
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
        assert kinds.total() == REQUESTS and kinds["gone"] > 0.17 * REQUESTS and kinds["garbage"] > 0.03 * REQUESTS
        wait_for(lambda: not service._texts and not service._gone)
        assert service.state == "ready" and engine.running == engine.waiting == 0 and engine.cache_used == 0
        metrics = service.metrics.render().decode()
    engine._scheduler.pages.check()
    assert engine._scheduler.pages.available == PAGES - 1
    assert sum(preempted) > 20
    assert 'idlm:engine_failures_total{model_name="tiny"} 0.0' in metrics
    assert 'finished_reason="abort",model_name="tiny"} 0.0' not in metrics
    assert memory[-1] - memory[0] < MOST_GROWTH, memory
