"""The HTTP API without a network: shapes of answers, errors, limits; the engine says a fixed text."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.decoding.logprobs import LogProbs
from idlm_jax.serving import api
from idlm_jax.serving.api import Limits
from idlm_jax.serving.log import JsonLines
from tests.serving.support import ScriptedEngine, client, get, post, serving, tiny

TEXT = "hello 12 and hello"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi", "max_tokens": 50}
BODY_LIMIT = 20_000


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    with serving(lambda: ScriptedEngine(TEXT), limits=Limits(body=BODY_LIMIT)) as (_, app):
        yield app


def events(text: str) -> list[Any]:
    """What a stream's events hold; checks that it ends as it should."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_completion_has_openais_fields_and_ours(app: FastAPI) -> None:
    answer = post(app, "/v1/completions", {**COMPLETION, "seed": 7}).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}]
    said, asked = len(tiny().tokenizer(TEXT).input_ids), len(tiny().tokenizer("hi").input_ids)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (asked, said, asked + said)
    assert usage["idlm"] == {"forwards": said, "tokens_per_forward": 1.0, "acceptance": [], "seed": 7}


def test_a_chat_answer_is_a_message(app: FastAPI) -> None:
    answer = post(app, "/v1/chat/completions", CHAT).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert answer["usage"]["prompt_tokens"] == len(tiny().encode(CHAT["messages"]))


def test_messages_may_come_in_parts_and_a_developer_is_the_system(app: FastAPI) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "brief"}, {"role": "user", "content": parts}]
    answer = post(app, "/v1/chat/completions", {**CHAT, "messages": messages}).json()
    plain = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
    assert answer["usage"]["prompt_tokens"] == len(tiny().encode(plain))


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_holds_the_same_text_in_pieces(usage: bool, app: FastAPI) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = events(post(app, "/v1/chat/completions", {**CHAT, "stream": True, "n": 2, **options}).text)
    for index in (0, 1):
        choices = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
        assert [choice["finish_reason"] for choice in choices][-1] == "length"
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert (chunks[-1]["choices"] == [] and "idlm" in chunks[-1]["usage"]) == usage
    assert all("usage" not in chunk or chunk["usage"] is None for chunk in chunks[: None if not usage else -1])


def test_a_stop_string_ends_the_text_before_it(app: FastAPI) -> None:
    for stop in (" and", [" and", "zzz"]):
        choice = post(app, "/v1/completions", {**COMPLETION, "stop": stop}).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("hello 12", "stop")
    chunks = events(post(app, "/v1/completions", {**COMPLETION, "stop": " and", "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello 12"


def test_a_completion_has_log_probabilities_where_they_are_asked_for(app: FastAPI) -> None:
    said = post(app, "/v1/completions", {**COMPLETION, "logprobs": 2}).json()["choices"][0]["logprobs"]
    tokens = tiny().tokenizer(TEXT).input_ids
    names = [tiny().tokenizer.decode([token]) for token in tokens]
    assert said["tokens"] == names and "".join(names) == TEXT
    assert said["text_offset"] == [len("".join(names[:i])) for i in range(len(names))]
    assert said["token_logprobs"] == [-i for i in range(len(tokens))]
    after = [tiny().tokenizer.decode([(token + 1) % 280]) for token in tokens]
    assert said["top_logprobs"] == [{names[i]: -i, after[i]: -i - 1} for i in range(len(tokens))]
    own = post(app, "/v1/completions", {**COMPLETION, "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert own["top_logprobs"] == [{names[i]: -i} for i in range(len(tokens))]


def test_a_chat_has_log_probabilities_where_they_are_asked_for(app: FastAPI) -> None:
    def content(**asked: Any) -> list[Any]:
        choice = post(app, "/v1/chat/completions", {**CHAT, "logprobs": True, **asked}).json()["choices"][0]
        return choice["logprobs"]["content"]

    tokens = tiny().tokenizer(TEXT).input_ids
    for count in (0, 2):
        said = content(top_logprobs=count)
        assert bytes(byte for entry in said for byte in entry["bytes"]).decode() == TEXT
        assert [entry["logprob"] for entry in said] == [-i for i in range(len(tokens))]
        for i, entry in enumerate(said):
            assert entry["token"] == tiny().tokenizer.decode([tokens[i]])
            assert [other["logprob"] for other in entry["top_logprobs"]] == [-i, -i - 1][:count]
            assert entry["top_logprobs"][:1] == [{k: entry[k] for k in ("token", "logprob", "bytes")}][:count]
    assert content() == content(top_logprobs=0)


@pytest.mark.parametrize("stop", [None, " and", "and", "lo 1", "hello"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_has_the_log_probabilities_of_the_whole_answer(chat: bool, stop: str | None, app: FastAPI) -> None:
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", COMPLETION)
    body = {**body, **({"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}), "stop": stop}
    whole = post(app, path, body).json()["choices"][0]
    chunks = events(post(app, path, {**body, "stream": True}).text)
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    joined: dict[str, list[Any]] = {}
    for part in parts:
        for key, values in part.items():
            joined[key] = joined.get(key, []) + (values or [])
    assert all(joined.get(key, []) == (values or []) for key, values in whole["logprobs"].items())
    # Tokens go out with their text, and those that the stop string cuts off do not go out.
    text = TEXT[: TEXT.find(stop)] if stop else TEXT
    said = "".join(e["token"] for e in joined.get("content", [])) if chat else "".join(joined.get("tokens", []))
    assert said.startswith(text) and len(said) - len(text) < len("hello")
    for chunk in chunks:
        choice = chunk["choices"][0]
        piece = choice["delta"].get("content", "") if chat else choice["text"]
        assert bool(piece) == bool(choice["logprobs"])


def test_parts_of_characters_are_told_by_their_bytes() -> None:
    with serving(lambda: ScriptedEngine("aö")) as (_, app):
        chat = post(app, "/v1/chat/completions", {**CHAT, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
        assert [(entry["token"], entry["bytes"]) for entry in chat] == [("a", [97]), ("�", [195]), ("�", [182])]
        said = post(app, "/v1/completions", {**COMPLETION, "logprobs": 0}).json()["choices"][0]["logprobs"]
        assert said["tokens"] == ["a", r"bytes:\xc3", r"bytes:\xb6"] and said["text_offset"] == [0, 1, 1]
        stream = events(post(app, "/v1/completions", {**COMPLETION, "logprobs": 0, "stream": True}).text)
        told = [c["choices"][0]["logprobs"]["tokens"] for c in stream if c["choices"][0]["logprobs"]]
        assert all(r"bytes:\xb6" in tokens for tokens in told if r"bytes:\xc3" in tokens)


def test_what_json_cannot_hold_is_a_number_all_the_same() -> None:
    engine = ScriptedEngine("ab")
    engine._logprobs = lambda tokens, count: LogProbs(tokens[:, None], np.array([[np.nan], [-np.inf]])[: len(tokens)])
    with serving(lambda: engine) as (_, app):
        said = post(app, "/v1/completions", {**COMPLETION, "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert said["token_logprobs"] == [-9999.0, -9999.0]


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs go with logprobs: true"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "top_logprobs go with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "top_logprobs must be in 0 … 5"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "top_logprobs must be in 0 … 5"),
    ],
)
def test_a_chat_that_asks_for_too_many_likely_tokens_is_refused(
    asked: dict[str, Any], param: str, said: str, app: FastAPI
) -> None:
    response = post(app, "/v1/chat/completions", {**CHAT, **asked})
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert said in response.json()["error"]["message"]


def test_a_server_that_keeps_no_log_probabilities_says_so() -> None:
    def without() -> ScriptedEngine:
        engine = ScriptedEngine(TEXT)
        engine.most_logprobs = 0
        return engine

    with serving(without) as (_, app):
        for path, body in (
            ("/v1/completions", {**COMPLETION, "logprobs": 0}),
            ("/v1/chat/completions", {**CHAT, "logprobs": True}),
        ):
            response = post(app, path, body)
            assert response.status_code == 400 and "--max-logprobs 0" in response.json()["error"]["message"]
        assert post(app, "/v1/chat/completions", {**CHAT, "logprobs": False}).status_code == 200


def test_an_answer_of_very_many_log_probabilities_is_refused_but_for_a_stream(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MOST_LOGPROBS_AN_ANSWER", 2 * 50 * 3)
    body = {**COMPLETION, "n": 2, "logprobs": 3}
    assert post(app, "/v1/completions", {**body, "logprobs": 2}).status_code == 200
    response = post(app, "/v1/completions", body)
    assert response.status_code == 400 and "up to 400 log-probabilities" in response.json()["error"]["message"]
    assert events(post(app, "/v1/completions", {**body, "stream": True}).text)


def test_several_prompts_and_choices_are_numbered_as_openai_does(app: FastAPI) -> None:
    prompts = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2}
    answer = post(app, "/v1/completions", {**COMPLETION, **prompts}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == sum(len(tiny().tokenizer(p).input_ids) for p in "ab")
    ids = tiny().tokenizer("hi").input_ids
    for prompt in (ids, [ids]):
        assert post(app, "/v1/completions", {**COMPLETION, "prompt": prompt}).json()["choices"][0]["text"] == TEXT


def test_both_names_of_the_model_are_listed_and_answer(app: FastAPI) -> None:
    listed = get(app, "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "tiny-adapter"]
    assert get(app, "/v1/models/tiny-adapter").json()["max_model_len"] == 128
    assert post(app, "/v1/completions", {**COMPLETION, "model": "tiny-adapter"}).json()["model"] == "tiny-adapter"


def test_health_readiness_and_metrics(app: FastAPI) -> None:
    post(app, "/v1/completions", COMPLETION)
    assert get(app, "/health").status_code == 200 and get(app, "/ready").json() == {"state": "ready"}
    lines = get(app, "/metrics").text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in lines
    assert 'vllm:time_to_first_token_seconds_bucket{le="' in lines and "idlm:forwards_total" in lines


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "tinny"}, 404, "model", "no model 'tinny' (there is tiny, tiny-adapter); did you mean 'tiny'?"),
    ({"model": None}, 422, "model", "valid string"),
    ({"prompt": 3}, 422, "prompt", "valid array"),
    ({"prompt": []}, 400, "prompt", "no prompt"),
    ({"prompt": ""}, 400, None, "the prompt is empty"),
    ({"prompt": [[]]}, 400, None, "the prompt is empty"),
    ({"prompt": [1, True]}, 422, "prompt", "valid integer"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens must be at least 1"),
    ({"max_tokens": -(10**30)}, 400, "max_tokens", "max_tokens must be at least 1"),
    ({"max_tokens": 10**30}, 400, "prompt", "room for 128 tokens"),
    ({"max_tokens": "5"}, 422, "max_tokens", "valid integer"),
    ({"max_tokens": 5.5}, 422, "max_tokens", "valid integer"),
    ({"temperature": -0.1}, 400, "temperature", "temperature must be in 0 … 2"),
    ({"temperature": 1e400}, 400, "temperature", "temperature must be in 0 … 2"),
    ({"temperature": [1]}, 422, "temperature", "valid number"),
    ({"top_p": 0}, 400, "top_p", "top_p must be in"),
    ({"top_p": 1.01}, 400, "top_p", "top_p must be in"),
    ({"top_k": -2}, 400, "top_k", "top_k must be"),
    ({"top_k": 2**31}, 400, "top_k", "top_k must be"),
    ({"seed": -1}, 400, "seed", "seed must be"),
    ({"seed": 2**64}, 400, "seed", "seed must be"),
    ({"n": 0}, 400, "n", "n must be in 1 … 128"),
    ({"n": 7}, 400, None, "7 texts; the server decodes 6 at most"),
    ({"stop": [""]}, 400, "stop", "stop strings must not be empty"),
    ({"stop": ["x"] * 3000}, 400, "stop", "at most 16 stop strings, not 3000"),
    ({"stop": "x" * 1000}, 400, "stop", "at most 256 characters"),
    ({"stop": [1]}, 422, "stop", "valid string"),
    ({"logprobs": 6}, 400, "logprobs", "logprobs must be in 0 … 5"),
    ({"logprobs": -1}, 400, "logprobs", "logprobs must be in 0 … 5"),
    ({"logprobs": True}, 422, "logprobs", "valid integer"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "'top_logprobs' is not supported"),
    ({"echo": True}, 400, "echo", "'echo' is not supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "'presence_penalty' is not supported"),
    ({"temprature": 1}, 400, "temprature", "unknown field 'temprature'; did you mean 'temperature'?"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "go with stream"),
    ({"stream": True, "stream_options": {"usage": True}}, 422, "stream_options", "Extra inputs"),
]


@pytest.mark.parametrize(("change", "status", "param", "said"), WRONG, ids=lambda v: str(v)[:60])
def test_a_wrong_field_is_named(
    change: dict[str, Any], status: int, param: str | None, said: str, app: FastAPI
) -> None:
    body = json.dumps({**COMPLETION, **change}).encode()
    response = post(app, "/v1/completions", body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param) and said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "status", "said"),
    [
        ([], 400, "messages must not be empty"),
        ("hi", 422, "'messages': Input should be a valid array"),
        ([{"role": "user"}], 422, "'messages.0.content' is missing"),
        ([{"role": "robot", "content": "a"}], 422, "'messages[0]'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], 422, "'messages[0]'"),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], 400, "'tool_calls' of a message"),
        ([{"role": "user", "content": "a" * 200}], 400, "room for 128 tokens"),
    ],
)
def test_wrong_messages_are_refused(messages: Any, status: int, said: str, app: FastAPI) -> None:
    response = post(app, "/v1/chat/completions", {**CHAT, "messages": messages})
    assert response.status_code == status and said in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["frequency_penalty", "logit_bias", "tools", "user", "logprobs", "response_format"])
def test_values_that_ask_for_nothing_are_taken(name: str, app: FastAPI) -> None:
    neutral: dict[str, list[Any]] = {
        "frequency_penalty": [0, 0.0, None],
        "logit_bias": [{}],
        "tools": [[]],
        "user": ["me"],
        "logprobs": [False],
        "response_format": [{"type": "text"}],
    }
    for value in neutral[name]:
        assert post(app, "/v1/chat/completions", {**CHAT, name: value}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[1]", 422, "must be a JSON object"),
        (b'"\xff\xfe"', 400, "not JSON"),
        (b'{"model": "tiny", "prompt": "\xc3\x28"}', 400, "not JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "not JSON"),
        (b"[" * 15_000, 400, "not JSON"),
        (b'{"model": "tiny", "prompt": "hi", "seed": 1' + b"0" * 6000 + b"}", 400, "number"),
        (b'{"model": "tiny", "prompt": "hi", "max_tokens": 1' + b"0" * 4290 + b"}", 400, "room for 128"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": NaN}', 400, "temperature must be in 0 … 2, not nan"),
        (b'{"model": "tiny", "prompt": "hi", "temperature": Infinity}', 400, "temperature must be in 0 … 2"),
        (b"x" * (BODY_LIMIT + 1), 413, "more than 20000 bytes"),
    ],
    ids=lambda v: str(v)[-40:],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes, status: int, said: str, app: FastAPI) -> None:
    response = post(app, "/v1/completions", body)
    assert response.status_code == status and said in response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(app: FastAPI) -> None:
    assert get(app, "/v1/nothing").status_code == 404 and get(app, "/v1/nothing").json()["error"]["message"]
    assert get(app, "/v1/completions").status_code == 405
    assert get(app, "/v1/models/other").json()["error"]["code"] == "model_not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["prompt", "messages", "n", "temperature", "top_p", "top_k", "seed", "stop", "stream", "max_tokens"]
NAMES += [
    "logprobs",
    "top_logprobs",
    "stop_token_ids",
    "ignore_eos",
    "stream_options",
    "logit_bias",
    "max_completion_tokens",
]


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3), chat=st.booleans())
def test_no_json_is_an_internal_error(changes: dict[str, Any], chat: bool, app: FastAPI) -> None:
    """Whatever the fields hold, the answer is one, or an error that says what is wrong; and the next one is served."""
    path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", COMPLETION)
    response = post(app, path, json.dumps({**body, **changes}).encode("utf-8", "surrogatepass"))
    assert response.status_code in (200, 400, 413, 422), response.text
    assert post(app, "/v1/completions", COMPLETION).json()["choices"][0]["text"] == TEXT


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with serving(ScriptedEngine, api_key="s3cret") as (_, app):
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Bearer "},
        ):
            for response in (
                post(app, "/v1/completions", COMPLETION, headers=header),
                get(app, "/v1/models", headers=header),
            ):
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert post(app, "/v1/completions", COMPLETION, headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert get(app, "/health").status_code == 200


def test_a_body_that_comes_too_slowly_is_given_up() -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    async def ask(app: FastAPI) -> Any:
        async with client(app) as http:
            return await http.post("/v1/completions", content=slow())

    with serving(ScriptedEngine, limits=Limits(body_seconds=0.1)) as (_, app):
        assert asyncio.run(ask(app)).status_code == 408


def test_the_log_holds_no_text_of_users(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "idlm_jax.serving")
    post(app, "/v1/completions", {**COMPLETION, "prompt": "zebra"})
    post(app, "/v1/completions", {**COMPLETION, "prompt": "zebra", "model": "zebra"})
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "idlm_jax.serving.api"]
    answered, refused = map(json.loads, lines)
    assert answered["event"] == "request" and answered["outcome"] == "answered" and answered["completion_tokens"] > 0
    assert refused["event"] == "refused" and refused["status"] == 404
    assert not any(text in line for line in lines for text in ("zebra", TEXT))
