"""Through the API, many requests at once have the texts that ``generate`` gives each of them alone."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from idlm_jax import SamplingParams
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.serving.engine import PagedEngine
from tests.serving.support import client, get, serving, tiny

COUNT, MOST, STRIDE = 100, 24, 3


def paged_engine() -> PagedEngine:
    return PagedEngine(tiny().model, [DecodeConfig(stride=STRIDE).policy()], places=8, capacity=128)


def mixed_requests() -> list[dict[str, Any]]:
    """Chats and texts, greedy and sampled, with stop strings, streams and several choices."""
    rng = np.random.default_rng(0)
    requests = []
    for number in range(COUNT):
        prompt = "".join(rng.choice(list("ab 12"), rng.integers(1, 40)))
        body: dict[str, Any] = {"model": "tiny", "max_tokens": int(rng.integers(1, MOST + 1)), "seed": number}
        body |= {"messages": [{"role": "user", "content": prompt}]} if number % 3 else {"prompt": prompt}
        body |= ({"temperature": 0}, {"top_p": 0.9}, {"top_k": 20, "temperature": 0.8}, {})[number % 4]
        body |= {"stop": ["e", "1"]} if number % 5 == 0 else {}
        body |= {"n": 2} if number % 10 == 3 else {}
        body |= {"ignore_eos": True} if number % 7 == 0 else {}
        requests.append(body)
    return requests


def expected(requests: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    """Texts and reasons of every request's choices, by AR decoding of one static batch."""
    prompts: list[Any] = []
    sampling = []
    for body in requests:
        params = SamplingParams(
            body.get("temperature", 1.0),
            body.get("top_k", 0),
            body.get("top_p", 1.0),
            body["seed"],
            body["max_tokens"],
            tuple(body.get("stop", ())),
            ignore_eos=body.get("ignore_eos", False),
        )
        for choice in range(body.get("n", 1)):
            prompts.append(body.get("prompt") or body["messages"])
            sampling.append(replace(params, seed=body["seed"] + choice))
    answers = iter(tiny().generate(prompts, sampling, stride=1))
    each = [[next(answers) for _ in range(body.get("n", 1))] for body in requests]
    return [[(answer.text, answer.finish_reason) for answer in choices] for choices in each]


def test_a_hundred_requests_at_once_have_the_texts_of_generate() -> None:
    requests = mixed_requests()

    async def ask_all(app: Any) -> list[Any]:
        async with client(app) as http:
            return await asyncio.gather(
                *(http.post(f"/v1/{'' if 'prompt' in body else 'chat/'}completions", json=body) for body in requests)
            )

    with serving(paged_engine, STRIDE, most_waiting=200) as (_, app):
        responses = asyncio.run(ask_all(app))
        metrics = get(app, "/metrics").text
        assert 'kv_cache_usage_perc{model_name="tiny"} 0.0' in metrics
        assert 'idlm:rounds_total{model_name="tiny",policy="N = 3 branch"}' in metrics
    for response, texts in zip(responses, expected(requests), strict=True):
        choices = response.json()["choices"]
        said = [(c["text"] if "text" in c else c["message"]["content"], c["finish_reason"]) for c in choices]
        assert said == texts
    usages = [response.json()["usage"]["idlm"] for response in responses]
    # Decoded by drafts, some of them right.
    assert sum(usage["tokens_per_forward"] for usage in usages) > 1.2 * len(usages)
