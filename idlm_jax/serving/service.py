"""Between HTTP and the engine: the engine's thread, the waiting line, text from tokens, and cancellation.

The thread alone touches the engine and the texts in progress. The event loop hands it requests and cancellations, and
gets text back, merged for whoever reads slowly: a call holds its unread text at most, and nobody waits for its reader.
"""

import asyncio
import contextlib
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int

from idlm_jax.decoding.admission import Request
from idlm_jax.decoding.generate import DecodeStats, Emission, SamplingParams, end_tokens, stats_from_history
from idlm_jax.decoding.text import TextBuilder, token_bytes
from idlm_jax.model import LanguageModel, Prompt
from idlm_jax.serving.engine import Engine
from idlm_jax.serving.metrics import Metrics

logger = logging.getLogger(__name__)

# Stands for log-probabilities that are less or no numbers, which JSON cannot hold; OpenAI and vLLM take it, too.
LOWEST_LOGPROB = -9999.0
# How long the event loop may keep the interpreter while the engine's thread asks for it. That thread gives it up many
# times a call; with Python's 5 ms a busy loop holds up the device.
_SWITCH_SECONDS = 0.0005


class BusyError(Exception):
    """The waiting line is full."""


class _StopError(Exception):
    """Warming up is over because the service stops."""


class UnavailableError(Exception):
    """The server cannot answer now: it starts, stops, or an error has ended what it was doing."""


@dataclass(frozen=True)
class TokenLogProb:
    """A token and the most likely ones in its place, with their log-probabilities."""

    # As arrays, a tenth of what objects would take: many may wait for their reader.
    ids: Int[np.ndarray, " K+1"]
    values: Float[np.ndarray, " K+1"]
    # Where in the text its own begins.
    offset: int

    def pairs(self) -> list[tuple[int, float]]:
        """Tokens and values: its own, then the most likely, the best first."""
        return list(zip(self.ids.tolist(), self.values.tolist(), strict=True))


@dataclass(frozen=True)
class Update:
    """New text of one of a call's texts; the last update of a text says why it ended and what it took."""

    text: str
    # Of the tokens of that text, where the call has asked.
    logprobs: tuple[TokenLogProb, ...] = ()
    finish_reason: str | None = None
    stats: DecodeStats | None = None


class Call:
    """The texts that one HTTP request asked for; belongs to the event loop that made it."""

    def __init__(self, requests: Sequence[Request]):
        self.requests, self.loop = requests, asyncio.get_running_loop()
        self._open = set(range(len(requests)))
        self._updates: dict[int, Update] = {}
        self._news = asyncio.Event()
        self._error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether all texts have ended and been read."""
        return not self._open

    async def news(self) -> dict[int, Update]:
        """Wait for news, by number of the text; raises UnavailableError if there will be none."""
        await self._news.wait()
        self._news.clear()
        if self._error:
            raise UnavailableError(self._error)
        updates, self._updates = self._updates, {}
        self._open -= {number for number, update in updates.items() if update.finish_reason}
        return updates

    def receive(self, updates: dict[int, Update], error: str | None) -> None:
        """Take up news, in the call's loop."""
        for number, update in updates.items():
            before = self._updates.get(number, Update(""))
            self._updates[number] = replace(
                update, text=before.text + update.text, logprobs=before.logprobs + update.logprobs
            )
        self._error = error
        self._news.set()


def _tell(news: Mapping[Call, dict[int, Update]], error: str | None = None) -> None:
    """Bring news to calls, from any thread; to all of a loop at once, as waking it up costs more than bringing them."""

    def receive(calls: Sequence[Call]) -> None:
        for call in calls:
            call.receive(news[call], error)

    for loop in {call.loop for call in news}:
        # A loop that has closed has nobody left to read this.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(receive, [call for call in news if call.loop is loop])


@dataclass
class _Text:
    """A text in progress."""

    call: Call
    number: int
    builder: TextBuilder
    # Tokens whose log-probabilities have been told.
    told: int = 0
    began: float = field(default_factory=time.monotonic)
    # When its first text was seen.
    first: float | None = None


class Service:
    """Answers calls by an engine that runs in a thread; ``start`` it, and ``stop`` it at the end."""

    def __init__(
        self,
        model: LanguageModel,
        stride: int,
        make_engine: Callable[[], Engine],
        most_waiting: int,
        metrics: Metrics,
        say: Callable[[str], None] = logger.info,
    ):
        """``make_engine`` is called again when an engine has failed; ``say`` gets the lines of warming up."""
        self.model, self.metrics = model, metrics
        self._stride, self._make_engine, self._say = stride, make_engine, say
        self._engine = make_engine()
        # Most tokens of a request, prompt included; and most texts that can be decoded or wait at once.
        self.capacity = self._engine.capacity
        self.most_logprobs = self._engine.most_logprobs
        self.most_texts = self._engine.places + most_waiting
        # What every token stands for.
        self.token_bytes = token_bytes(model.tokenizer, model.config.vocab_size) if self.most_logprobs else []
        # "starting", "ready", "stopping", "failed".
        self.state = "starting"
        self._ids = itertools.count()
        # The tokenizer is not made for several threads, and long prompts must not hold up the event loop.
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._changed = threading.Condition()
        # Under the condition: what the thread has not taken up yet, and the texts that it works on.
        self._new: list[tuple[Request, _Text]] = []
        self._gone: set[int] = set()
        self._texts: dict[int, _Text] = {}

    def start(self) -> None:
        """Warm up, then answer."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; calls that are still open fail."""
        with self._changed:
            self.state = "stopping"
            self._changed.notify()
        self._thread.join()
        self._encoder.shutdown()
        self._fail("the server is stopping")

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises UserError or UnavailableError."""
        self._require_ready()
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self.model.encode, prompt)

    def submit(self, asked: Sequence[tuple[Sequence[int], SamplingParams]], logprobs: int | None = None) -> Call:
        """Queue prompts, each with its sampling parameters; raises UserError, BusyError or UnavailableError.

        ``logprobs`` as in ``Request``.
        """
        requests = [Request(next(self._ids), prompt, sampling, logprobs) for prompt, sampling in asked]
        call = Call(requests)
        with self._changed:
            # While it is ready, and nobody can say otherwise, there is an engine.
            self._require_ready()
            for request in requests:
                self._engine.check(request)
            if len(self._texts) + len(self._new) + len(requests) > self.most_texts:
                raise BusyError(f"{self.most_texts} texts are being decoded or waiting; try again later")
            self._new += [
                (request, _Text(call, number, self._builder(request))) for number, request in enumerate(requests)
            ]
            self._changed.notify()
        self.metrics.prompt_tokens.inc(sum(len(prompt) for prompt, _ in asked))
        return call

    def release(self, call: Call) -> None:
        """Stop what a call has not finished."""
        if call.finished:
            return
        with self._changed:
            self._gone |= {request.id for request in call.requests}
            self._changed.notify()

    def _builder(self, request: Request) -> TextBuilder:
        ends = end_tokens(self.model.model, request.sampling)
        return TextBuilder(self.model.tokenizer, request.sampling.stop, ends)

    def _require_ready(self) -> None:
        if self.state != "ready":
            raise UnavailableError(f"the engine is {self.state}")

    def _run(self) -> None:
        while self._answer() and self._renew():
            pass

    def _answer(self) -> bool:
        """Answer until the service stops (False) or the engine fails; True if making it again may help."""
        try:
            self._engine.warm_up(self._say_unless_stopping)
            self._become("ready")
            while self._take_up():
                if self._texts:
                    self._step()
            return False
        except _StopError:
            return False
        except Exception:
            logger.exception("the engine failed")
        self.metrics.engine_failures.inc()
        # An engine that never was ready would fail again.
        again = self.state == "ready"
        self._become("starting" if again else "failed")
        self._fail("an internal error ended this request")
        return again

    def _say_unless_stopping(self, line: str) -> None:
        if self.state == "stopping":
            raise _StopError
        self._say(line)

    def _renew(self) -> bool:
        """Replace the engine, whose state on the device may be lost."""
        try:
            # Two engines may not fit on the device: the old one goes first.
            del self._engine
            self._engine = self._make_engine()
            return True
        except Exception:
            logger.exception("the engine cannot be made again")
        self._become("failed")
        return False

    def _become(self, state: str) -> None:
        with self._changed:
            if self.state != "stopping":
                self.state = state

    def _take_up(self) -> bool:
        """Wait for something to do and hand it to the engine; False once the service stops."""
        with self._changed:
            self._changed.wait_for(lambda: self.state == "stopping" or self._new or self._gone or self._texts)
            new, self._new = self._new, []
            gone, self._gone = self._gone, set()
            self._texts.update((request.id, text) for request, text in new)
            cancelled = [self._texts.pop(id) for id in gone if id in self._texts]
        self._engine.submit([request for request, _ in new])
        if cancelled:
            self._engine.cancel(gone)
            self.metrics.cancelled(len(cancelled))
            self._report_load()
        return self.state != "stopping"

    def _step(self) -> None:
        news: dict[Call, dict[int, Update]] = {}
        stopped = set()
        for answer in self._engine.step():
            id = answer.request.id
            text = self._texts[id]
            update = self._feed(text, answer.emission)
            if update.text or update.finish_reason:
                news.setdefault(text.call, {})[text.number] = update
            if update.finish_reason:
                with self._changed:
                    del self._texts[id]
                if not answer.emission.done:
                    stopped.add(id)
        if stopped:
            self._engine.cancel(stopped)
        self._report_load()
        _tell(news)

    def _report_load(self) -> None:
        self.metrics.load(self._engine.running, self._engine.waiting, self._engine.cache_used)
        self.metrics.ran(self._engine.take_rounds())

    def _feed(self, text: _Text, emission: Emission) -> Update:
        builder = text.builder
        new = emission.tokens[len(builder.token_ids) :].tolist()
        pieces = builder.feed(new, [False] * len(new))
        if emission.done:
            pieces += builder.finish()
        said = "".join(piece.text for piece in pieces)
        if said and text.first is None:
            text.first = time.monotonic()
        logprobs = self._told(text, emission)
        if builder.finish_reason is None:
            return Update(said, logprobs)
        stats = stats_from_history(emission.history, len(builder.token_ids), self._stride)
        self.metrics.ended(stats, builder.finish_reason, text.began, text.first)
        return Update(said, logprobs, builder.finish_reason, stats)

    def _told(self, text: _Text, emission: Emission) -> tuple[TokenLogProb, ...]:
        """Log-probabilities of the tokens whose text has just come out."""
        if emission.logprobs is None:
            return ()
        new = slice(text.told, text.builder.shown)
        text.told = new.stop
        ids, values = emission.logprobs.ids[new], np.fmax(emission.logprobs.values[new], LOWEST_LOGPROB)
        return tuple(map(TokenLogProb, ids, values, text.builder.offsets[new]))

    def _fail(self, why: str) -> None:
        with self._changed:
            failed = [*self._texts.values(), *(text for _, text in self._new)]
            self._texts, self._new = {}, []
        _tell({text.call: {} for text in failed}, why)
