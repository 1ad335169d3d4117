"""Load measured against a server whose every delay is known, and its sums against numpy."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from idlm_jax import UserError
from idlm_jax.evaluation.load import Level, Record, Workload, arrivals, measure
from idlm_jax.evaluation.load_report import as_dict, grids, remarks
from idlm_jax.serving.client import Client
from tests.cli.decoding_support import refused, run
from tests.serving.fake_server import Script, fake_server

WORK = Workload("fake", output_tokens=6, prompt_tokens=5, token_ids=(100, 200), seed=3)


@pytest.fixture
def script() -> Iterator[Script]:
    with fake_server(Script()) as running:
        yield running


def load(script: Script, requests: int, clients: int | None, rate: float | None = None, work: Workload = WORK) -> Level:
    return measure(Client(script.url, "key"), work, requests, clients, rate, lambda: None)


def record(sent: float, first: float, ended: float, tokens: int = 10, **more: Any) -> Record:
    """Its text comes in two equal pieces, at the beginning and at the end."""
    return Record(sent, ended, [first, ended], [4, 4], 5, tokens, **more)


@pytest.mark.parametrize("chunked", [True, False])
def test_times_and_counts_are_the_servers(script: Script, chunked: bool) -> None:
    script.first, script.gap, script.chunked = 0.2, 0.1, chunked
    script.idlm = {"forwards": 3, "acceptance": [0.5, 0.25]}
    level = load(script, 4, 2)
    assert len(level.answered) == 4 and script.most_open == 2
    for one in level.answered:
        assert (one.prompt_tokens, one.tokens, one.sizes) == (5, 6, [2, 2, 2])
        # Never sooner than the script says; a busy machine may be later.
        assert 0.19 < one.time_to_first < 0.6 and 0.39 < one.latency < 1.2
        assert one.time_per_token is not None and 0.19 / 5 < one.time_per_token < 0.6 / 5
    # Two rounds of two clients.
    assert 0.78 < level.seconds < 2.4
    assert level.tokens_per_second == pytest.approx(24 / level.seconds)
    assert (level.tokens_per_forward, level.acceptance) == (2.0, (0.5, 0.25))
    assert 0 < level.client_load < 1


def test_each_client_asks_again_when_it_has_its_answer(script: Script) -> None:
    script.first = 0.05
    level = load(script, 9, 3)
    sent = sorted(one.sent for one in level.records)
    ended = sorted(one.ended for one in level.records)
    assert sent[2] < ended[0]
    assert all(begin >= end for begin, end in zip(sent[3:], ended, strict=False))
    assert script.most_open == 3 and len(level.answered) == 9


def test_a_burst_comes_at_once(script: Script) -> None:
    script.first = 0.3
    assert load(script, 20, 20).seconds < 3 and script.most_open == 20


def test_arrivals_are_poisson_and_the_same_for_a_seed(script: Script) -> None:
    times = arrivals(4000, 20.0, 7)
    gaps = np.diff(times)
    assert times[0] == 0 and times == arrivals(4000, 20.0, 7) != arrivals(4000, 20.0, 8)
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.05) and np.std(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert np.mean(gaps > 1 / 20) == pytest.approx(math.exp(-1), abs=0.03)
    level = load(script, 10, None, rate=40.0)
    sent = [one.sent for one in level.records]
    assert sent == pytest.approx(arrivals(10, 40.0, WORK.seed), abs=0.15)
    assert all(is_ >= due - 1e-3 for is_, due in zip(sent, arrivals(10, 40.0, WORK.seed), strict=True))
    # At most so many at once, even where more have arrived.
    script.first, script.most_open = 0.1, 0
    load(script, 6, 2, rate=1000.0)
    assert script.most_open == 2


def test_prompts_are_random_tokens_reproducible_and_never_repeated(script: Script) -> None:
    load(script, 3, 3)
    load(script, 3, 3)
    load(script, 2, 2)
    assert {path for path, _ in script.asked} == {"/v1/completions"}
    by_seed = {body["seed"]: body for _, body in script.asked}
    assert len(by_seed) == 5, "the second level repeats the first, the third is another"
    body = script.asked[0][1]
    assert len(body["prompt"]) == 5 and all(100 <= token < 200 for token in body["prompt"])
    assert body["ignore_eos"] and body["max_tokens"] == 6 and body["model"] == "fake" and body["temperature"] == 0
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert len({tuple(body["prompt"]) for body in by_seed.values()}) == 5


def test_chats_are_asked_in_turn(script: Script) -> None:
    chats = [[{"role": "user", "content": name}] for name in "ab"]
    load(script, 3, 1, work=Workload("fake", 6, 0, (0, 1), chats))
    assert [(path, body["messages"]) for path, body in script.asked] == [
        ("/v1/chat/completions", chats[i]) for i in (0, 1, 0)
    ]
    assert all("prompt" not in body for _, body in script.asked)


def test_failures_are_counted_by_status_and_count_for_nothing_else(script: Script) -> None:
    script.statuses = (200, 429, 0, 503, 429, 200)
    level = load(script, 6, 1)
    assert level.errors == {"429": 2, "stream": 1, "503": 1}
    assert as_dict(level)["output_tokens"] == 12 and len(level.answered) == 2
    assert [one.message for one in level.records][1] == "no, 429"
    assert "2 × 429, 1 × stream, 1 × 503" in grids([level])[0].rows[0]


def test_a_server_that_has_gone_is_an_error_of_the_connection() -> None:
    with fake_server(Script()) as script:
        pass
    with pytest.raises(UserError, match=r"all 3 requests failed, the first with: .*Connect call failed"):
        load(script, 3, 3)


def test_percentiles_are_numpys() -> None:
    random = np.random.default_rng(0)
    first, rest, tokens = random.random(200), 1 + random.random(200), random.integers(1, 30, 200)
    records = [record(0.5, 0.5 + f, 0.5 + f + r, int(n)) for f, r, n in zip(first, rest, tokens, strict=True)]
    level = Level(4, None, [*records, Record(0.0, 9.0, error="429")], 0.1)
    at = (50, 95, 99)
    assert level.percentiles("time_to_first") == pytest.approx(np.percentile(first, at))
    assert level.percentiles("latency") == pytest.approx(np.percentile(first + rest, at))
    several = tokens > 1
    assert level.percentiles("time_per_token") == pytest.approx(
        np.percentile(rest[several] / (tokens[several] - 1), at)
    )
    assert as_dict(level)["TTFT"]["p95"] == pytest.approx(np.percentile(first, 95))


def test_the_steady_interval_leaves_filling_and_emptying_out() -> None:
    # Two clients: full from 2 (the second's first text) to 9 (the first answer that nothing follows).
    records = [record(0, 1, 4), record(0, 2, 5), record(4, 6, 9), record(5, 7, 11)]
    level = Level(2, None, records, 0.1)
    assert level.steady == (2, 9)
    # In it: the ends of the first two, all of the third, the beginning of the last.
    assert level.steady_tokens_per_second == pytest.approx((5 + 5 + 10 + 5) / 7)
    assert level.tokens_per_second == pytest.approx(40 / 11)
    # With arrivals: from the first whole answer.
    assert Level(None, 1.0, records, 0.1).steady == (4, 9)
    # A burst whose first answer is there before the last has begun was never full.
    burst = Level(2, None, [record(0, 1, 2), record(0, 3, 4)], 0.1)
    assert burst.steady is None and burst.steady_tokens_per_second is None
    assert as_dict(burst)["steady_seconds"] is None and grids([burst])[0].rows[0][5] == "-"


def test_a_client_that_is_too_slow_says_so() -> None:
    records = [record(0, 1, 4), record(0, 2, 5)]
    assert len(remarks([Level(2, None, records, 0.3)])) == 1
    assert "took 90% of a processor" in remarks([Level(2, None, records, 0.3), Level(4, None, records, 0.9)])[1]


def bench(script: Script, *more: object) -> list[object]:
    return ["bench", "serve", "--url", script.url, *more]


def test_tables_json_and_files(script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.gap, script.idlm = 0.01, {"forwards": 3, "acceptance": [0.5, 0.25]}
    given = bench(script, "--concurrency", 1, 4, "--requests", 5, "--output", tmp_path / "new" / "load")
    code, out, _ = run(capsys, *given)
    assert code == 0 and "prompts of 128 random tokens" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("1 ", "4 "))]
    assert [row[:5] for row in rows[:2]] == [["1", "5", "0", "5", "6"], ["4", "5", "0", "5", "6"]]
    assert all(row[-3:] == ["2.00", "0.50", "0.25"] for row in rows[:2])
    assert len(script.asked) == 11, "two levels and the one that goes ahead"
    code, out, _ = run(capsys, *given, "--json")
    printed = [json.loads(line) for line in out.splitlines()]
    stored = json.loads((tmp_path / "new" / "load" / "load.json").read_text())
    assert [level["concurrency"] for level in printed] == [1, 4]
    for level, whole in zip(printed, stored["levels"], strict=True):
        records = whole.pop("records")
        assert level == whole and len(records) == 5
        assert level["output_tokens"] == sum(one["tokens"] for one in records) == 30
        assert level["TTFT"]["p50"] == pytest.approx(np.median([one["first"] - one["sent"] for one in records]))
    assert imread(tmp_path / "new" / "load" / "load.png").std() > 0.02


def test_arrivals_and_chats_from_the_command_line(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    given = ("--request-rate", 100, "--prompts", chats, "--num-prompts", 4, "--output", tmp_path)
    code, out, _ = run(capsys, *bench(script, *given))
    assert code == 0 and "prompts of 2 chats" in out and "100/s" in out
    assert len(script.asked) == 5 and {path for path, _ in script.asked} == {"/v1/chat/completions"}


def test_what_cannot_be_measured_is_one_line(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, says in (
        (("--concurrency", 0), "--concurrency must be at least 1, not 0"),
        (("--requests", 0), "--requests must be at least 1"),
        (("--prompt-tokens", 0), "--prompt-tokens must be at least 1"),
        (("--output-tokens", 0), "--output-tokens must be at least 1"),
        (("--concurrency", 1, 8, "--requests", 4), "--requests 4 leaves some of the 8 clients without any"),
        (("--rate", 0), "--rate must be positive"),
        (("--rate", "nan"), "--rate must be positive"),
        (("--temperature", "inf"), "--temperature must be at least 0"),
        (("--seed", -1), "--seed must be at least 0"),
        (("--token-ids", 9, 9), "--token-ids must be a range of ids"),
        (("--prompts", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--prompts", tmp_path / "none.jsonl", "--prompt-tokens", 9), "give either --prompts, or --prompt-tokens"),
        (("--model", "fakes"), "has no model 'fakes' (there is fake); did you mean 'fake'?"),
    ):
        assert says in refused(capsys, *bench(script, *flags))
    assert not script.asked
    for url, says in (("http://127.0.0.1:9", "cannot reach"), ("ftp://x", "no address"), ("http://x:y", "no address")):
        assert says in refused(capsys, "bench", "serve", "--url", url)
    for status in (400, 401, 503):
        script.statuses = (status,)
        assert f"no, {status}" in refused(capsys, *bench(script))
    script.statuses = (0,)
    assert "the answer broke off" in refused(capsys, *bench(script))
    script.statuses, script.usage = (200,), False
    assert "the stream holds no usage" in refused(capsys, *bench(script))
    script.statuses, script.usage = (200,) * (len(script.asked) + 1) + (429,), True
    assert "all 8 requests failed, the first with: no, 429" in refused(capsys, *bench(script, "--concurrency", 2))
