"""Prometheus metrics, under vLLM's names where it has them, so that its dashboards work; ours begin with ``idlm:``."""

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from idlm_jax.decoding.generate import DecodeStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_LABELS = ("model_name",)


class Metrics:
    """What a server counts and measures, in a registry of its own."""

    def __init__(self, model: str):
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(name, meaning, _LABELS, registry=registry).labels(model)

        def counter(name: str, meaning: str) -> Counter:
            return Counter(name, meaning, _LABELS, registry=registry).labels(model)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, meaning, _LABELS, registry=registry, buckets=buckets).labels(model)

        self._running = gauge("vllm:num_requests_running", "Texts being decoded.")
        self._waiting = gauge("vllm:num_requests_waiting", "Texts that wait to be decoded.")
        self._used = gauge("vllm:kv_cache_usage_perc", "Share of the cache that is taken, 0 to 1.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of accepted texts.")
        self._tokens = counter("vllm:generation_tokens", "Tokens of finished texts.")
        self._first = histogram("vllm:time_to_first_token_seconds", "From submission to the first text.", _SECONDS)
        self._each = histogram("vllm:time_per_output_token_seconds", "A token after the first text.", _TOKEN_SECONDS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From submission to the end.", _SECONDS)
        self._verified = counter("vllm:spec_decode_num_drafts", "Rounds that verified drafts.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Drafts that were verified.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafts that were accepted.")
        self._forwards = counter("idlm:forwards", "Rounds that finished texts took part in.")
        self._rounds = Counter("idlm:rounds", "Forward passes.", [*_LABELS, "policy"], registry=registry)
        self._model = model
        self.engine_failures = counter("idlm:engine_failures", "Errors that ended the engine.")
        ends = Counter("vllm:request_success", "Texts that ended.", [*_LABELS, "finished_reason"], registry=registry)
        self._ends = {reason: ends.labels(model, reason) for reason in ("stop", "length", "abort")}

    def load(self, running: int, waiting: int, used: float) -> None:
        """How busy the engine is, and which share of its cache is taken."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._used.set(used)

    def ran(self, rounds: Mapping[str, int]) -> None:
        """Rounds that were run, by policy."""
        for policy, count in rounds.items():
            self._rounds.labels(self._model, policy).inc(count)

    def cancelled(self, texts: int) -> None:
        """Texts whose client has gone."""
        self._ends["abort"].inc(texts)

    def ended(self, stats: DecodeStats, reason: str, began: float, first: float | None) -> None:
        """A finished text; times as ``time.monotonic`` gives them."""
        now = time.monotonic()
        self._ends[reason].inc()
        self._tokens.inc(stats.tokens)
        self._forwards.inc(stats.forwards)
        verified = stats.forwards - stats.cold_rounds if stats.accepted else 0
        self._verified.inc(verified)
        self._drafted.inc(verified * len(stats.accepted))
        self._accepted.inc(sum(stats.accepted))
        self._whole.observe(now - began)
        if first is not None:
            self._first.observe(first - began)
            if stats.tokens > 1:
                self._each.observe((now - first) / (stats.tokens - 1))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
