"""Load on a server of the OpenAI API: streams at once, each one's times, and what they say together.

Names and meanings are those of vLLM's ``vllm bench serve``: time to first token (TTFT) from sending a request to its
first text, connection included; time per output token (TPOT) after it; latency to the end of the stream. Tokens are
the server's own count.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from idlm_jax.errors import UserError
from idlm_jax.serving.client import Client
from idlm_jax.serving.streams import RefusedError, events

PERCENTILES = (50, 95, 99)
# An answer that takes longer counts as failed.
_SECONDS = 3600.0


@dataclass(frozen=True)
class Workload:
    """What is asked; the same for the same seed."""

    model: str
    output_tokens: int
    # Prompts of this many random tokens, their ids drawn from a range (its end excluded) …
    prompt_tokens: int
    token_ids: tuple[int, int]
    # … or chats, in turn.
    chats: Sequence[Sequence[dict[str, str]]] = ()
    temperature: float = 0.0
    seed: int = 0

    @property
    def path(self) -> str:
        """Where the API takes it."""
        return "/v1/chat/completions" if self.chats else "/v1/completions"

    def bodies(self, count: int, part: int) -> list[dict[str, Any]]:
        """Requests, others for every ``part``, so that no cache of prefixes knows them from another measurement."""
        common = {
            "model": self.model,
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
        }
        random = np.random.default_rng([self.seed, part])
        seeds = random.integers(2**31, size=count).tolist()
        if self.chats:
            prompts = [{"messages": self.chats[i % len(self.chats)]} for i in range(count)]
        else:
            ids = random.integers(*self.token_ids, size=(count, self.prompt_tokens))
            prompts = [{"prompt": row} for row in ids.tolist()]
        return [{**common, "seed": seed, **prompt} for seed, prompt in zip(seeds, prompts, strict=True)]


@dataclass
class Record:
    """One request; times in seconds since the level began."""

    sent: float
    ended: float = 0.0
    # When each piece of text came, and its characters.
    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    # Of idlm servers: forward passes, and the share that accepted the first k drafts.
    forwards: int | None = None
    acceptance: tuple[float, ...] = ()
    # HTTP status, "stream" (it broke off) or "connection"; None if all went well. And what the server says.
    error: str | None = None
    message: str = ""

    @property
    def first(self) -> float:
        """When the first text came, or the end of a stream without any."""
        return self.times[0] if self.times else self.ended

    @property
    def time_to_first(self) -> float:
        """TTFT."""
        return self.first - self.sent

    @property
    def time_per_token(self) -> float | None:
        """TPOT; None for a text of one token."""
        return (self.ended - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def latency(self) -> float:
        """From sending to the end."""
        return self.ended - self.sent

    def tokens_between(self, begin: float, end: float) -> float:
        """Tokens that came after ``begin`` and up to ``end``; a piece has as many as its share of the characters."""
        times, sizes = np.array(self.times), np.array(self.sizes)
        inside = (times > begin) & (times <= end)
        return self.tokens * float(sizes[inside].sum() / max(sizes.sum(), 1))


@dataclass(frozen=True)
class Level:
    """One measurement: so many clients, or arrivals at a rate."""

    # Most requests at once; None is no limit.
    concurrency: int | None
    # Requests a second, in a Poisson process; None: as many at once as there may be.
    rate: float | None
    records: Sequence[Record]
    # Share of a processor that this side took: near 1 it, not the server, is what was measured.
    client_load: float

    @cached_property
    def answered(self) -> list[Record]:
        """Requests that went well."""
        return [record for record in self.records if record.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """The others, by kind."""
        return dict(Counter(record.error for record in self.records if record.error is not None))

    @property
    def seconds(self) -> float:
        """Wall clock, from the first request to the last answer."""
        return max(record.ended for record in self.records) - min(record.sent for record in self.records)

    @property
    def tokens_per_second(self) -> float:
        """All tokens over the wall clock: filling and emptying the batch included."""
        return sum(record.tokens for record in self.answered) / self.seconds

    @cached_property
    def steady(self) -> tuple[float, float] | None:
        """The interval in which the load was full; None if there was none.

        It ends with the first answer that no further request follows. It begins when every client has had text or,
        with arrivals at a rate, with the first answer that is complete.
        """
        if self.rate is None:
            firsts = sorted(record.first for record in self.answered)
            full = min(self.concurrency or len(self.records), len(self.records))
            if len(firsts) < full:
                return None
            begin = firsts[full - 1]
        else:
            begin = min(record.ended for record in self.answered)
        last_sent = max(record.sent for record in self.records)
        end = min(record.ended for record in self.records if record.ended > last_sent)
        return (begin, end) if begin < end else None

    @property
    def steady_tokens_per_second(self) -> float | None:
        """Tokens over the steady interval."""
        if self.steady is None:
            return None
        begin, end = self.steady
        return sum(record.tokens_between(begin, end) for record in self.answered) / (end - begin)

    @property
    def tokens_per_forward(self) -> float | None:
        """TPF of all tokens, where the server tells."""
        forwards = sum(record.forwards or 0 for record in self.answered)
        return sum(record.tokens for record in self.answered) / forwards if forwards else None

    @property
    def acceptance(self) -> tuple[float, ...]:
        """P_k, the mean over requests, where the server tells."""
        told = [record.acceptance for record in self.answered if record.acceptance]
        depth = max(map(len, told), default=0)
        return tuple(float(np.mean([shares[k] for shares in told if len(shares) > k])) for k in range(depth))

    def percentiles(self, what: str) -> tuple[float, ...]:
        """PERCENTILES of a property of requests, in seconds; nan where there are none."""
        values = [value for record in self.answered if (value := getattr(record, what)) is not None]
        return tuple(np.percentile(values, PERCENTILES).tolist()) if values else (float("nan"),) * len(PERCENTILES)


def try_out(client: Client, workload: Workload) -> None:
    """Ask once, which also warms up; raises UserError where the answer is none, or its tokens cannot be counted."""
    (record,) = asyncio.run(_ask_all(client, workload.path, workload.bodies(1, 0), [0.0], 1, lambda: None))
    if record.error is not None:
        raise UserError(f"{client.url}: {record.message}")


def measure(
    client: Client,
    workload: Workload,
    requests: int,
    concurrency: int | None,
    rate: float | None,
    done: Callable[[], None],
) -> Level:
    """Send ``requests``, at most ``concurrency`` at once: each as soon as one ends, or at a ``rate`` but no sooner.

    ``done`` is called as each ends. Raises UserError if all fail.
    """
    bodies = workload.bodies(requests, 1 + (concurrency or 0))
    at = arrivals(requests, rate, workload.seed)
    began, busy = time.perf_counter(), time.process_time()
    records = asyncio.run(_ask_all(client, workload.path, bodies, at, concurrency or requests, done))
    load = (time.process_time() - busy) / (time.perf_counter() - began)
    level = Level(concurrency, rate, records, load)
    if not level.answered:
        raise UserError(f"{client.url}: all {requests} requests failed, the first with: {records[0].message}")
    return level


def arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """When requests are sent, in seconds: all at once, or from 0 on with exponential gaps of mean 1 / rate."""
    if rate is None:
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


async def _ask_all(
    client: Client,
    path: str,
    bodies: Sequence[dict[str, Any]],
    at: Sequence[float],
    concurrency: int,
    done: Callable[[], None],
) -> list[Record]:
    room = asyncio.Semaphore(concurrency)
    began = time.perf_counter()

    async def ask(body: dict[str, Any], at: float) -> Record:
        await asyncio.sleep(began + at - time.perf_counter())
        async with room:
            record = await _ask(client, path, body, began)
        done()
        return record

    return await asyncio.gather(*[ask(*pair) for pair in zip(bodies, at, strict=True)])


async def _ask(client: Client, path: str, body: dict[str, Any], began: float) -> Record:
    record = Record(time.perf_counter() - began)
    usage: dict[str, Any] | None = None
    try:
        async with asyncio.timeout(_SECONDS):
            async for event in events(client, path, body):
                for choice in event.get("choices") or ():
                    if text := choice.get("text") or choice.get("delta", {}).get("content"):
                        record.times.append(time.perf_counter() - began)
                        record.sizes.append(len(text))
                usage = event.get("usage") or usage
        if usage is None:
            raise RefusedError(None, "the stream holds no usage (stream_options.include_usage), so nothing is counted")
        record.prompt_tokens, record.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        ours = usage.get("idlm") or {}
        record.forwards, record.acceptance = ours.get("forwards"), tuple(ours.get("acceptance", ()))
    except (LookupError, TypeError, AttributeError):
        record.error, record.message = "stream", "the events are not of the OpenAI API"
    except RefusedError as error:
        record.error, record.message = str(error.status or "stream"), error.message
    except (OSError, TimeoutError) as error:
        record.error, record.message = "connection", str(error) or f"no answer within {_SECONDS:.0f} s"
    record.ended = time.perf_counter() - began
    return record
