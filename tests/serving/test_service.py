"""The service around an engine by script: the waiting line, clients that go or stop reading, engines that fail."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import pytest

from idlm_jax.serving.api import Limits
from tests.serving.support import Client, ScriptedEngine, client, get, post, serving, wait_for

TEXT = "hello 12 and hello"
BODY = {"model": "tiny", "prompt": "hi", "max_tokens": 50}


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until something has happened."""
    await asyncio.to_thread(wait_for, condition)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_a_full_line_is_refused_and_those_in_it_are_answered() -> None:
    engine = ScriptedEngine(TEXT)
    with serving(lambda: engine, most_waiting=4) as (_, app):

        async def work() -> None:
            engine.go.clear()
            async with client(app) as http:
                asked = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(6)]
                await until(lambda: engine.running + engine.waiting == 6)
                refused = await http.post("/v1/completions", json=BODY)
                assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "rate_limit_error"
                engine.go.set()
                answers = await asyncio.gather(*asked)
                assert [answer.json()["choices"][0]["text"] for answer in answers] == [TEXT] * 6
                assert (await http.post("/v1/completions", json=BODY)).status_code == 200

        run(work)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", [0, 3], ids=["running", "waiting"])
def test_a_client_that_goes_frees_its_place_and_disturbs_nobody(stream: bool, place: int) -> None:
    engine = ScriptedEngine(TEXT)
    with serving(lambda: engine) as (_, app):

        async def work() -> None:
            engine.go.clear()
            clients = [Client(app, {**BODY, "stream": stream}) for _ in range(4)]
            tasks = []
            for number, each in enumerate(clients):
                tasks.append(asyncio.create_task(each.ask()))
                await until(lambda number=number: engine.running + engine.waiting == number + 1)
            clients[place].gone.set()
            await until(lambda: engine.cancelled)
            await tasks[place]
            engine.go.set()
            await asyncio.gather(*tasks)
            assert len(engine.cancelled) == 1 and engine.running == 0
            assert b"hello" not in clients[place].received
            others = [each.received for each in clients if each is not clients[place]]
            assert all(b'"finish_reason":"length"' in text.replace(b": ", b":") for text in others)

        run(work)
        assert 'finished_reason="abort",model_name="tiny"} 1.0' in get(app, "/metrics").text


def test_a_client_that_stops_reading_holds_up_nobody_and_is_given_up() -> None:
    engine = ScriptedEngine(TEXT)
    with serving(lambda: engine, limits=Limits(stall_seconds=0.5)) as (_, app):

        async def work() -> None:
            stuck, other = Client(app, {**BODY, "stream": True}), Client(app, BODY)
            stuck.reading.clear()
            asked = asyncio.create_task(stuck.ask())
            await until(lambda: engine.running == 0)
            await asyncio.wait_for(other.ask(), 10)
            assert json.loads(other.received)["choices"][0]["text"] == TEXT
            await asyncio.wait_for(asked, 10)
            assert b"hello" not in stuck.received

        run(work)


def test_text_that_nobody_has_read_yet_comes_in_one_piece() -> None:
    engine = ScriptedEngine(TEXT)
    with serving(lambda: engine) as (_, app):

        async def work() -> None:
            slow = Client(app, {**BODY, "stream": True})
            slow.reading.clear()
            asked = asyncio.create_task(slow.ask())
            await until(lambda: engine.running == 0 and engine.go.is_set())
            await asyncio.sleep(0.1)
            slow.reading.set()
            await asked
            assert slow.received.count(b"data: ") == 2 and TEXT.encode() in slow.received

        run(work)


def test_an_engine_that_fails_is_made_again() -> None:
    engines: list[ScriptedEngine] = []

    def make() -> ScriptedEngine:
        engines.append(ScriptedEngine(TEXT))
        return engines[-1]

    with serving(make) as (service, app):
        engines[0].fail = RuntimeError("out of memory, and a secret")
        failed = post(app, "/v1/completions", BODY)
        assert failed.status_code == 503 and "secret" not in failed.text
        wait_for(lambda: service.state == "ready")
        assert len(engines) == 2
        engines[1].fail = RuntimeError()
        assert '"error"' in post(app, "/v1/completions", {**BODY, "stream": True}).text
        wait_for(lambda: service.state == "ready")
        assert post(app, "/v1/completions", BODY).json()["choices"][0]["text"] == TEXT
        assert 'idlm:engine_failures_total{model_name="tiny"} 2.0' in get(app, "/metrics").text


def test_an_engine_that_never_works_is_no_endless_loop() -> None:
    class Broken(ScriptedEngine):
        def warm_up(self, say: Callable[[str], None]) -> None:
            raise RuntimeError

    with serving(Broken, until="failed") as (service, app):
        assert service.state == "failed" and get(app, "/health").status_code == 503
        response = post(app, "/v1/completions", BODY)
        assert response.status_code == 503 and response.json()["error"]["message"] == "the engine is failed"


def test_nothing_is_answered_before_the_programs_are_compiled() -> None:
    engine = ScriptedEngine(TEXT)
    engine.warm_up = lambda say: wait_for(engine.go.is_set)
    engine.go.clear()
    with serving(lambda: engine, until="starting") as (_, app):
        assert get(app, "/health").status_code == 200
        assert get(app, "/ready").status_code == 503 and get(app, "/ready").json() == {"state": "starting"}
        assert post(app, "/v1/completions", BODY).status_code == 503
        engine.go.set()
        wait_for(lambda: get(app, "/ready").status_code == 200)
        assert post(app, "/v1/completions", BODY).status_code == 200


def test_stopping_while_programs_are_compiled_waits_for_one_of_them_at_most() -> None:
    engine, said = ScriptedEngine(TEXT), []

    def warm_up(say: Callable[[str], None]) -> None:
        for number in range(1000):
            time.sleep(0.02)
            say(f"{number}")
            said.append(number)

    engine.warm_up = warm_up
    with serving(lambda: engine, until="starting"):
        wait_for(lambda: said)
    assert len(said) < 500


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(stream: bool) -> None:
    engine = ScriptedEngine(TEXT)
    with serving(lambda: engine, limits=Limits(answer_seconds=0.2)) as (_, app):
        engine.go.clear()
        response = post(app, "/v1/completions", {**BODY, "stream": stream})
        assert response.status_code == (200 if stream else 503) and '"code"' in response.text
        assert "timeout" in response.text
        wait_for(lambda: len(engine.cancelled) == 1)


def test_stopping_fails_what_is_open() -> None:
    engine = ScriptedEngine(TEXT)
    with serving(lambda: engine) as (service, app):
        engine.go.clear()

        async def work() -> None:
            async with client(app) as http:
                asked = asyncio.create_task(http.post("/v1/completions", json=BODY))
                await until(lambda: engine.running == 1)
                await asyncio.to_thread(service.stop)
                answer: httpx2.Response = await asked
                assert answer.status_code == 503
                assert (await http.post("/v1/completions", json=BODY)).status_code == 503

        run(work)


def test_a_step_wakes_the_loop_once_for_all_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(TEXT, places=4)
    with serving(lambda: engine) as (_, app):

        async def work() -> None:
            woken, told = asyncio.get_running_loop().call_soon_threadsafe, []

            def counted(callback: Callable[..., None], *arguments: Any, **how: Any) -> Any:
                if threading.current_thread().name == "engine":
                    told.append(len(arguments[0]))
                return woken(callback, *arguments, **how)

            monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", counted)
            engine.go.clear()
            async with client(app) as http:
                asked = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(4)]
                await until(lambda: engine.running == 4)
                engine.go.set()
                answers = await asyncio.gather(*asked)
            assert [answer.json()["choices"][0]["text"] for answer in answers] == [TEXT] * 4
            assert told and set(told) == {4}

        run(work)
