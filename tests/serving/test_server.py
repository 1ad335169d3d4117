"""A server in a process of its own, asked by the official client, by ``idlm chat``, and by clients that misbehave."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx2
import jax.numpy as jnp
import numpy as np
import openai
import psutil
import pytest

from idlm_jax import SamplingParams
from idlm_jax.backbone.qwen3 import causal_logits
from idlm_jax.cli.serve import served_names
from tests.cli.decoding_support import refused
from tests.cli.decoding_support import run as run_cli
from tests.serving.support import TINY, tiny, wait_for

KEY = "s3cret"
MODEL = "qwen3_f32"
CHAT: Any = [{"role": "user", "content": "hi"}]
PLACES = 4


@dataclass
class Server:
    """A running ``idlm serve``."""

    process: "subprocess.Popen[str]"
    log: Path
    port: int
    http: httpx2.Client = field(default_factory=lambda: httpx2.Client(headers={"authorization": f"Bearer {KEY}"}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metric(self, name: str) -> float:
        lines = self.http.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def start(log: Path) -> Server:
    """A server of the tiny model on a free port, once it is ready."""
    command = [sys.executable, "-m", "idlm_jax.cli.main", "serve", "--model", TINY, "--mask-token", 0, "--port", 0]
    command += ["--dtype", "float32", "--stride", 3, "--places", PLACES, "--max-waiting", 40, "--api-key", KEY]
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stderr=file,
            text=True,
            env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        )
    wait_for(lambda: "listening" in log.read_text() or process.poll() is not None, 120)
    assert process.poll() is None, log.read_text()
    server = Server(process, log, int(log.read_text().split("http://127.0.0.1:")[1].split()[0]))
    wait_for(lambda: server.http.get(f"{server.url}/ready").status_code == 200, 240)
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def expected(max_tokens: int, seed: int, **changes: Any) -> str:
    """What the model says to CHAT, by AR."""
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, **changes)
    return tiny().generate([CHAT], sampling, stride=1)[0].text


def test_the_official_client_lists_models_and_chats(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=20, seed=3)
    assert answer.choices[0].message.content == expected(20, 3)
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.completion_tokens == 20 and answer.usage.model_extra["idlm"]["tokens_per_forward"] >= 1
    # The client's own messages go back with the next turn.
    again: Any = [*CHAT, answer.choices[0].message, {"role": "user", "content": "x"}]
    assert client.chat.completions.create(model=MODEL, messages=again, max_tokens=2).choices[0].finish_reason


def test_the_official_client_streams_and_reads_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=60, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(60, 3)
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 60


def test_completions_choices_stop_strings_and_seeds(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="ab", max_tokens=8, n=3, seed=5)
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 3
    assert client.completions.create(model=MODEL, prompt="ab", max_tokens=8, seed=6).choices[0].text == texts[1]
    stop = expected(20, 3)[4]
    stopped = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=20, seed=3, stop=stop).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", expected(20, 3, stop=(stop,)))


def test_the_official_client_sees_log_probabilities(client: openai.OpenAI) -> None:
    model, prompt = tiny(), tiny().encode(CHAT)
    asked: Any = {"model": MODEL, "messages": CHAT, "max_tokens": 30, "seed": 3, "top_logprobs": 4}
    choice = client.chat.completions.create(**asked, logprobs=True).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert choice.message.content == expected(30, 3)
    tokens = model.generate([CHAT], SamplingParams(temperature=1.0, seed=3, max_tokens=30), stride=1)[0].token_ids
    logits = np.array(causal_logits(model.model, jnp.asarray([[*prompt, *tokens]])), np.float64)[
        0, len(prompt) - 1 : -1
    ]
    logits[:, 0] = -np.inf  # the mask
    plain = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    content = choice.logprobs.content
    assert len(content) == len(tokens)
    np.testing.assert_allclose([e.logprob for e in content], plain[np.arange(len(tokens)), tokens], atol=1e-4)
    tops = [[top.logprob for top in entry.top_logprobs] for entry in content]
    np.testing.assert_allclose(tops, -np.sort(-plain, axis=1)[:, :4], atol=1e-4)
    chunks = list(client.chat.completions.create(**asked, logprobs=True, stream=True))
    streamed = [entry for c in chunks if (said := c.choices[0].logprobs) for entry in said.content or []]
    assert streamed == content
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=30, seed=3, logprobs=4).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.token_logprobs == [entry.logprob for entry in content]
    assert whole.logprobs.text_offset is not None and whole.logprobs.text_offset[0] == 0


def test_load_is_measured_with_prompts_of_token_ids(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "serve", "--url", server.url, "--prompt-tokens", 8, "--output-tokens", 20, "--json"]
    keyed = [*given, "--api-key", KEY]
    sizes = ("--concurrency", 1, PLACES + 1, "--requests", PLACES + 2, "--token-ids", 5, 280)
    code, out, _ = run_cli(capsys, *keyed, *sizes)
    levels = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [level["concurrency"] for level in levels] == [1, PLACES + 1]
    for level in levels:
        assert level["errors"] == {} and level["requests"] == PLACES + 2
        assert (level["prompt_tokens"], level["output_tokens"]) == (8 * (PLACES + 2), 20 * (PLACES + 2))
        assert level["tokens_per_forward"] >= 1 and len(level["acceptance"]) == 2
    assert "wrong or missing API key" in refused(capsys, *given)
    outside = refused(capsys, *keyed, "--token-ids", 280, 281)
    assert "prompt token outside the vocabulary of 280" in outside
    assert "room for 128 tokens" in refused(capsys, *keyed, "--prompt-tokens", 120)


def test_the_official_client_knows_our_errors(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        create(model="gpt", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="must be in 0 … 20") as too_many:
        create(model=MODEL, messages=CHAT, logprobs=True, top_logprobs=21)
    assert too_many.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="room for 128 tokens") as too_long:
        create(model=MODEL, messages=CHAT, max_tokens=1000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens"):
        create(model=MODEL, messages=CHAT, max_tokens=cast("int", "many"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def send(server: Server, body: bytes, after: float) -> None:
    """One POST from a client that leaves ``after`` so many seconds."""
    lines = ["POST /v1/completions HTTP/1.1", "host: x", f"authorization: Bearer {KEY}", f"content-length: {len(body)}"]
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        time.sleep(after)


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_closes_frees_its_place(stream: bool, server: Server) -> None:
    before = server.metric('vllm:request_success_total{finished_reason="abort"')
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 120, "stream": stream, "n": 40, "ignore_eos": True}
    send(server, json.dumps(body).encode(), after=0.02)
    wait_for(lambda: server.metric('vllm:request_success_total{finished_reason="abort"') > before)
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0)


def test_what_is_no_http_ends_nothing(server: Server, client: openai.OpenAI) -> None:
    for data in (
        b"\x00\xff" * 100,
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(data)
            connection.settimeout(5)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    assert client.completions.create(model=MODEL, prompt="ab", max_tokens=2).choices[0].text is not None


def test_idlm_chat_talks_with_a_server(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\nhi\n" + "x" * 200 + "\n"))
    flags = ("--api-key", KEY, "--temperature", 1, "--seed", 3, "--max-tokens", 10)
    code, out, _ = run_cli(capsys, "chat", "--url", server.url, *flags)
    said = expected(10, 3)
    assert code == 0 and out.count(said) == 2 and "cut at 10 tokens" in out and "room for 128 tokens" in out
    assert "wrong or missing API key" in refused(capsys, "chat", "--url", server.url)
    assert "no model 'x'" in refused(capsys, "chat", "x", "--url", server.url, "--api-key", KEY)
    assert "leave those flags out" in refused(capsys, "chat", "--url", server.url, "--stride", 2)
    assert "cannot reach http://127.0.0.1:9" in refused(capsys, "chat", "--url", "http://127.0.0.1:9")
    assert "give a MODEL to load, or --url" in refused(capsys, "chat")


def test_sigterm_answers_what_is_there_and_ends_well(tmp_path: Path) -> None:
    server = start(tmp_path / "log")
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 120, "n": 40, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool, httpx2.Client(headers=server.http.headers, timeout=120) as http:
        asked = pool.submit(http.post, f"{server.url}/v1/completions", json=body)
        wait_for(lambda: server.metric("vllm:num_requests_running") > 0)
        server.process.send_signal(signal.SIGTERM)
        answer = asked.result()
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 40
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def behave(server: Server, number: int) -> str:
    """One request of the soak test: good, garbage, or with a client that leaves; says which."""
    rng = random.Random(number)
    kind = rng.choices(["good", "gone", "garbage"], [75, 20, 5])[0]
    body: dict[str, Any] = {"model": MODEL, "prompt": "ab 12"[: rng.randint(1, 5)] * rng.randint(1, 5), "seed": number}
    body |= {"max_tokens": rng.randint(1, 60), "temperature": rng.choice([0, 1]), "stream": rng.random() < 0.5}
    body |= {"stop": ["e"]} if rng.random() < 0.3 else {}
    if kind == "gone":
        send(server, json.dumps(body | {"max_tokens": 90}).encode(), after=rng.random() * 0.1)
    elif kind == "garbage":
        wrong = rng.choice(
            [b"{", b"\xff", json.dumps(body | {"n": -1}).encode(), json.dumps(body | {"stop": [1]}).encode()]
        )
        assert server.http.post(f"{server.url}/v1/completions", content=wrong).status_code in (400, 422)
    else:
        answer = server.http.post(f"{server.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert "[DONE]" in answer.text if body["stream"] else answer.json()["choices"][0]["finish_reason"]
    return kind


@pytest.mark.slow
def test_soak(server: Server) -> None:
    """2,000 requests of mixed shapes: the well-formed are answered, places are free and memory is flat at the end."""
    process = psutil.Process(server.process.pid)
    memory = []
    with ThreadPoolExecutor(16) as pool:
        for part in range(4):
            kinds = list(pool.map(lambda number: behave(server, number), range(500 * part, 500 * (part + 1))))
            assert kinds.count("gone") > 50 and kinds.count("garbage") > 5
            memory.append(process.memory_info().rss)
    wait_for(lambda: server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0)
    assert server.metric("idlm:engine_failures_total") == 0
    assert memory[3] - memory[1] < 20 * 2**20, memory
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--places", 0), "--places must be at least 1"),
        (("--max-logprobs", -1), "--max-logprobs must be at least 0"),
        (("--port", 70000), "--port must be at most 65535"),
        (("--timeout", "nan"), "--timeout must be at least 1"),
        (("--cache-gb", "nan"), "--cache-gb must be at least 0, not nan"),
        (("--cache-gb", "inf"), "--cache-gb must be at least 0 and finite, not inf"),
        (("--cache-gb", -1), "--cache-gb must be at least 0, not -1"),
        (("--mask-token", 0, "--cache-gb", 0), "a text of 128 tokens needs a cache of"),
        (
            ("--mask-token", 0, "--cache-gb", 1e-4, "--max-length", 120, "--dtype", "float32", "--no-adaptive"),
            "lower --max-length to",
        ),
        ((), "--mask-token"),
        (("--mask-token", 0, "--max-length", 1000), "--max-length 1000 exceeds the model's context of 128"),
    ],
)
def test_bad_flags_are_one_line(flags: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "serve", "--model", TINY, *flags)


def test_an_adapter_that_changes_the_text_takes_the_models_own_name_away() -> None:
    assert served_names("models/a.gguf", None, None, True) == ("a",)
    assert served_names("models/a", None, "runs/b", True) == ("a", "a-b")
    assert served_names("models/a", "c", "runs/b", False) == ("c-b",)
