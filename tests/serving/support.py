"""What the serving tests share: a tiny model, an engine by script, and HTTP without a network."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx2
import numpy as np
from fastapi import FastAPI

from idlm_jax import LanguageModel, UserError, load
from idlm_jax.decoding.admission import Answer, Request
from idlm_jax.decoding.generate import Emission
from idlm_jax.decoding.logprobs import LogProbs
from idlm_jax.serving.api import Limits, Settings, create_app
from idlm_jax.serving.engine import Engine
from idlm_jax.serving.metrics import Metrics
from idlm_jax.serving.service import Service
from tests.support import GOLDEN

TINY = GOLDEN / "gguf" / "qwen3_f32.gguf"
NAMES = ("tiny", "tiny-adapter")


@cache
def tiny() -> LanguageModel:
    """A random two-layer model with a real tokenizer and chat template; its context is 128 tokens."""
    return load(TINY, dtype="float32", mask_token=0)


class ScriptedEngine:
    """Says the same text for every request, a token a step; ``fail`` makes the next step raise.

    Token t at position i has the log-probability -i; the likely ones in its place are t, t + 1, … with -i, -i - 1, …
    """

    def __init__(self, text: str = "hello 12 and hello", places: int = 2, capacity: int = 128):
        self.places, self.capacity, self.most_logprobs = places, capacity, 5
        self._tokens = tiny().tokenizer(text).input_ids
        self._here: dict[int, tuple[Request, int]] = {}
        self.cancelled: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.fail: Exception | None = None

    @property
    def running(self) -> int:
        return min(len(self._here), self.places)

    @property
    def waiting(self) -> int:
        return len(self._here) - self.running

    @property
    def cache_used(self) -> float:
        return self.running / self.places

    def take_rounds(self) -> dict[str, int]:
        return {}

    def warm_up(self, say: Callable[[str], None]) -> None:
        say("warm")

    def check(self, request: Request) -> None:
        if not request.prompt:
            raise UserError("the prompt is empty")

    def submit(self, requests: Iterable[Request]) -> None:
        self._here |= {request.id: (request, 0) for request in requests}

    def cancel(self, ids: Collection[int]) -> None:
        self.cancelled += [id for id in ids if self._here.pop(id, None)]

    def step(self) -> list[Answer]:
        assert self._here, "a step without a request"
        self.go.wait(timeout=0.02)
        if self.fail:
            error, self.fail = self.fail, None
            raise error
        if not self.go.is_set():
            return []
        answers = []
        for id, (request, said) in list(self._here.items())[: self.places]:
            tokens = np.array(self._tokens[: min(said + 1, request.sampling.max_tokens)])
            done = len(tokens) in (len(self._tokens), request.sampling.max_tokens)
            logprobs = self._logprobs(tokens, request.logprobs)
            answers.append(Answer(request, Emission(tokens, np.zeros(len(tokens), int), done, logprobs)))
            self._here[id] = request, said + 1
            if done:
                del self._here[id]
        return answers

    @staticmethod
    def _logprobs(tokens: np.ndarray, count: int | None) -> LogProbs | None:
        if count is None:
            return None
        steps = np.array([0, *range(count)])
        ids = (tokens[:, None] + steps) % tiny().config.vocab_size
        return LogProbs(ids, -np.arange(len(tokens), dtype=np.float32)[:, None] - steps)


@contextmanager
def serving(
    make_engine: Callable[[], Engine],
    stride: int = 1,
    most_waiting: int = 4,
    api_key: str | None = None,
    limits: Limits | None = None,
    until: str = "ready",
) -> Iterator[tuple[Service, FastAPI]]:
    """A running service and its application."""
    service = Service(tiny(), stride, make_engine, most_waiting, Metrics("tiny"), say=lambda line: None)
    app = create_app(service, Settings(NAMES, api_key, limits or Limits()))
    service.start()
    try:
        wait_for(lambda: service.state == until, 120)
        yield service, app
    finally:
        service.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something that a thread does has happened."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def client(app: FastAPI) -> httpx2.AsyncClient:
    """HTTP to an application in this process."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test", timeout=120)


class Client:
    """A client at the level of ASGI: it can go away, and it can stop reading."""

    def __init__(self, app: FastAPI, body: dict[str, Any] | bytes, path: str = "/v1/completions"):
        self._app, self._path = app, path
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = 0
        self.gone, self.reading = asyncio.Event(), asyncio.Event()
        self.reading.set()
        self.received = b""
        self._asked = False

    async def ask(self) -> None:
        """One POST."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.received += message.get("body", b"")
        await self.reading.wait()


def post(app: FastAPI, path: str, body: Any, **how: Any) -> httpx2.Response:
    """One POST; ``body`` as bytes or JSON."""

    async def ask() -> httpx2.Response:
        async with client(app) as http:
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            return await http.post(path, **given, **how)

    return asyncio.run(ask())


def get(app: FastAPI, path: str, **how: Any) -> httpx2.Response:
    """One GET."""

    async def ask() -> httpx2.Response:
        async with client(app) as http:
            return await http.get(path, **how)

    return asyncio.run(ask())
