"""The OpenAI-style HTTP API over a service: routes, limits, errors, and what its answers look like."""

import asyncio
import hmac
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from idlm_jax.decoding.generate import DecodeStats, total_stats
from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.serving.log import log
from idlm_jax.serving.schemas import ChatBody, CompletionBody, RequestError, parse
from idlm_jax.serving.service import BusyError, Call, Service, TokenLogProb, UnavailableError, Update

logger = logging.getLogger(__name__)


# Twelve texts of 1,000 tokens with 20 likely ones in each place: 30 MB of JSON, and several times that to make it.
MOST_LOGPROBS_AN_ANSWER = 2**18


@dataclass(frozen=True)
class Limits:
    """What a client may use up."""

    # Bytes of a body.
    body: int = 2**20
    # Seconds to send a body in; to take the next piece of a stream in; and for the whole answer.
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    answer_seconds: float = 600.0


@dataclass(frozen=True)
class Settings:
    """How a server presents itself."""

    # Names that clients may ask for; the first is the model's own.
    names: tuple[str, ...]
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    # Write prompts and texts into the log.
    log_prompts: bool = False


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The application; the service starts and stops with its lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    # The API is OpenAI's: there is nothing to describe, and no documentation to fetch from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.include_router(_public(service))
    app.include_router(_guarded(service, settings), prefix="/v1")

    async def refused(request: Request, error: Exception) -> Response:
        refusal = _as_request_error(error)
        log(logger, "refused", path=request.url.path, status=refusal.status, code=refusal.code)
        return _error_response(refusal)

    for kind in (RequestError, UserError, BusyError, UnavailableError, TimeoutError, HTTPException, Exception):
        app.add_exception_handler(kind, refused)
    return app


def _public(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if service.state == "failed" else 200)

    @router.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"state": service.state}, 200 if service.state == "ready" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    return router


def _guarded(service: Service, settings: Settings) -> APIRouter:
    async def authorize(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        expected = settings.api_key
        if expected is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), expected.encode())
        ):
            raise RequestError(401, "wrong or missing API key", None, "invalid_api_key")

    router = APIRouter(dependencies=[Depends(authorize)])
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "idlm",
            "max_model_len": service.capacity,
        }

    @router.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in settings.names]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        _require_model(name, settings)
        return JSONResponse(described(name))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, CompletionBody, Completions(), service, settings)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, ChatBody, ChatCompletions(), service, settings)

    return router


class Completions:
    """Answers of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A whole text."""
        return self.piece(index, text, reason, logprobs)

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with."""
        return None

    def piece(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """New text of a stream."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenLogProb], names: Sequence[bytes]) -> dict[str, Any]:
        """Log-probabilities of tokens; ``names`` are what all tokens stand for."""

        def likely(entry: TokenLogProb) -> dict[str, float]:
            # The token itself is there also where it is not among the most likely.
            by_name: dict[str, float] = {}
            for token, value in entry.pairs():
                by_name.setdefault(_key(names[token]), value)
            return by_name

        return {
            "tokens": [_key(names[entry.ids[0]]) for entry in tokens],
            "token_logprobs": [float(entry.values[0]) for entry in tokens],
            "top_logprobs": [likely(entry) for entry in tokens],
            "text_offset": [entry.offset for entry in tokens],
        }


class ChatCompletions:
    """Answers of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A whole text."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """New text of a stream."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens: Sequence[TokenLogProb], names: Sequence[bytes]) -> dict[str, Any]:
        """Log-probabilities of tokens; ``names`` are what all tokens stand for."""

        def described(token: int, value: float) -> dict[str, Any]:
            name = names[token]
            return {"token": name.decode("utf-8", "replace"), "logprob": value, "bytes": list(name)}

        content = [[described(*pair) for pair in entry.pairs()] for entry in tokens]
        return {"content": [{**own, "top_logprobs": top} for own, *top in content], "refusal": None}


def _key(name: bytes) -> str:
    """A token of a completion's log-probabilities; parts of characters keep apart by their bytes, as OpenAI has it."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in name)


@dataclass
class _Answer:
    """One request being answered."""

    body: CompletionBody | ChatBody
    form: Completions | ChatCompletions
    call: Call
    service: Service
    settings: Settings
    began: float
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, tuple[TokenLogProb, ...]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    stats: list[DecodeStats] = field(default_factory=list)
    outcome: str = "disconnected"

    def __post_init__(self) -> None:
        self.id = self.form.prefix + uuid.uuid4().hex

    async def updates(self) -> AsyncIterator[dict[int, Update]]:
        """News of the texts, kept here as well."""
        deadline = asyncio.get_running_loop().time() + self.settings.limits.answer_seconds
        while not self.call.finished:
            # Not around the yield: it would end whatever the reader does there.
            async with asyncio.timeout_at(deadline):
                updates = await self.call.news()
            for number, update in updates.items():
                self.texts[number] = self.texts.get(number, "") + update.text
                if not self.body.stream:
                    self.logprobs[number] = self.logprobs.get(number, ()) + update.logprobs
                if update.finish_reason is not None and update.stats is not None:
                    self.reasons[number] = update.finish_reason
                    self.stats.append(update.stats)
            yield updates
        self.outcome = "answered"

    def usage(self) -> dict[str, Any]:
        """Tokens as OpenAI counts them, and how they were decoded."""
        stats = total_stats(self.stats)
        # A prompt counts once, however many texts it has.
        prompts = sum(len(request.prompt) for request in self.call.requests[:: self.body.choices])
        return {
            "prompt_tokens": prompts,
            "completion_tokens": stats.tokens,
            "total_tokens": prompts + stats.tokens,
            "idlm": {
                "forwards": stats.forwards,
                "tokens_per_forward": stats.tokens_per_forward,
                "acceptance": list(stats.acceptance),
                "seed": self.call.requests[0].sampling.seed,
            },
        }

    def whole(self) -> dict[str, Any]:
        """The answer of a request that is no stream."""
        choices = [
            self.form.choice(i, self.texts[i], self.reasons[i], self._described(self.logprobs[i]))
            for i in range(len(self.call.requests))
        ]
        return {**self._head(self.form.kind), "choices": choices, "usage": self.usage()}

    def _described(self, tokens: tuple[TokenLogProb, ...]) -> dict[str, Any] | None:
        asked = self.call.requests[0].logprobs is not None
        return self.form.logprobs(tokens, self.service.token_bytes) if asked else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    async def events(self) -> AsyncIterator[str]:
        """A stream's events; an error after the first of them is an event, too."""
        try:
            for number in range(len(self.call.requests)):
                if opening := self.form.opening(number):
                    yield self._event(opening)
            async for updates in self.updates():
                # An event a text: clients look at the first choice of each alone.
                for number, update in updates.items():
                    logprobs = self._described(update.logprobs) if update.logprobs else None
                    yield self._event(self.form.piece(number, update.text, update.finish_reason, logprobs))
        except (UnavailableError, TimeoutError) as error:
            self.outcome = "failed"
            yield _event(_as_request_error(error).body())
            return
        if self.body.include_usage:
            yield _event({**self._head(self.form.chunk_kind), "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def _event(self, choice: dict[str, Any]) -> str:
        usage = {"usage": None} if self.body.include_usage else {}
        return _event({**self._head(self.form.chunk_kind), "choices": [choice], **usage})

    def close(self) -> None:
        """Give up what is still being decoded, and write the line of the log."""
        self.service.release(self.call)
        line = {
            "id": self.id,
            "model": self.body.model,
            "stream": bool(self.body.stream),
            "texts": len(self.call.requests),
            "outcome": self.outcome,
            "finish_reasons": list(self.reasons.values()),
            "prompt_tokens": sum(len(request.prompt) for request in self.call.requests[:: self.body.choices]),
            "completion_tokens": sum(stats.tokens for stats in self.stats),
            "forwards": sum(stats.forwards for stats in self.stats),
            "seconds": round(time.monotonic() - self.began, 4),
        }
        if self.settings.log_prompts:
            line |= {"prompts": self.body.prompts(), "answers": list(self.texts.values())}
        log(logger, "request", **line)


class _EventStream(StreamingResponse):
    """Server-sent events that end with the client, or where it stops reading."""

    def __init__(self, answer: _Answer):
        headers = {"cache-control": "no-cache", "x-request-id": answer.id}
        super().__init__(answer.events(), headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._answer.settings.limits.stall_seconds

        async def send_in_time(message: AsgiMessage) -> None:
            async with asyncio.timeout(seconds):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            self._answer.outcome = "stalled"
        finally:
            self._answer.close()


async def _answer(
    request: Request,
    kind: type[CompletionBody] | type[ChatBody],
    form: Completions | ChatCompletions,
    service: Service,
    settings: Settings,
) -> Response:
    began = time.monotonic()
    body = parse(kind, await _read(request, settings.limits))
    _require_model(body.model, settings)
    answer = _Answer(body, form, await _submit(body, service), service, settings, began)
    if body.stream:
        return _EventStream(answer)

    async def collect() -> None:
        async for _ in answer.updates():
            pass

    try:
        if not await _unless_disconnected(request, collect()):
            return Response(status_code=499)  # for nobody
    except BaseException:
        answer.outcome = "failed"
        raise
    finally:
        answer.close()
    # Log-probabilities make large answers, and the event loop has others to look after.
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(), headers={"x-request-id": answer.id}))


async def _submit(body: CompletionBody | ChatBody, service: Service) -> Call:
    prompts = body.prompts()
    if not prompts:
        raise RequestError(400, "there is no prompt", "prompt")
    if len(prompts) * body.choices > service.most_texts:
        raise RequestError(400, f"{len(prompts) * body.choices} texts; the server decodes {service.most_texts} at most")
    logprobs = body.wanted_logprobs(service.most_logprobs)
    seed = secrets.randbits(32) if body.seed is None else body.seed
    what = "messages" if isinstance(body, ChatBody) else "prompt"
    asked = []
    for prompt in prompts:
        tokens = await service.encode(prompt)
        most = body.most_tokens(service.capacity - len(tokens))
        sampling = [body.sampling((seed + i) % 2**32, most) for i in range(body.choices)]
        if len(tokens) + most > service.capacity:
            raise RequestError(
                400,
                f"the context has room for {service.capacity} tokens, but {len(tokens)} of the {what} and {most} "
                f"(max_tokens) of the text are {len(tokens) + most}",
                what,
                "context_length_exceeded",
            )
        asked += [(tokens, params) for params in sampling]
    if logprobs is not None and not body.stream:
        numbers = (1 + logprobs) * sum(params.max_tokens for _, params in asked)
        if numbers > MOST_LOGPROBS_AN_ANSWER:
            raise RequestError(
                400,
                f"max_tokens of all texts ask for up to {numbers} log-probabilities; an answer that is no stream has "
                f"{MOST_LOGPROBS_AN_ANSWER} at most",
                "logprobs",
            )
    return service.submit(asked, logprobs)


async def _read(request: Request, limits: Limits) -> bytes:
    """The body, as long as it is neither too long nor too slow."""
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limits.body:
                    raise RequestError(413, f"the body has more than {limits.body} bytes", None, "body_too_large")
    except ClientDisconnect:
        raise RequestError(400, "the body is not whole") from None  # for nobody
    except TimeoutError:
        raise RequestError(408, f"the body took more than {limits.body_seconds:g} s", None, "body_too_slow") from None
    return bytes(data)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, None]) -> bool:
    """Wait for ``work``; False, and the work is given up, when the client has gone before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        await tasks[0]
        return True
    finally:
        for task in tasks:
            task.cancel()


def _require_model(name: str, settings: Settings) -> None:
    if name not in settings.names:
        known = ", ".join(settings.names)
        raise RequestError(
            404, f"no model '{name}' (there is {known}){did_you_mean(name, settings.names)}", "model", "model_not_found"
        )


def _as_request_error(error: Exception) -> RequestError:
    match error:
        case RequestError():
            return error
        case UserError():
            return RequestError(400, str(error))
        case BusyError():
            return RequestError(429, str(error), None, "queue_full")
        case UnavailableError():
            return RequestError(503, str(error), None, "unavailable")
        case TimeoutError():
            return RequestError(503, "the answer took too long", None, "timeout")
        case HTTPException():
            return RequestError(error.status_code, str(error.detail))
        case _:
            return RequestError(500, "internal error")


def _error_response(error: RequestError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
