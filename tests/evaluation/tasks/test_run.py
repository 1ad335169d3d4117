"""Runs of tasks: what every answer leaves, going on after an interruption, and refusing to mix what differs."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

import idlm_jax
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks.item import Item
from idlm_jax.evaluation.tasks.run import RunConfig, default_modes, read_samples, read_task, run_tasks
from idlm_jax.evaluation.tasks.summary import summarize
from idlm_jax.model import LanguageModel
from tests.cli.decoding_support import TINY, Script
from tests.decoding.helpers import drafting_adapter, drafting_model

ABOUT = {"model": "tiny", "adapter": None}


@cache
def model() -> LanguageModel:
    return idlm_jax.load(TINY, mask_token=270)


def score(text: str, wanted: str) -> dict[str, bool]:
    return {"long": len(text) > 20, "found": wanted in text}


def items(count: int = 4) -> list[Item]:
    words = ["a", "hello there", "12", "the quick brown fox"]
    return [Item(f"q{i}", words[i], partial(score, wanted=words[i])) for i in range(count)]


def config(output: Path, **changes: object) -> RunConfig:
    plain = RunConfig(output, DecodeConfig(stride=3), ("ar", "isd"), (0.0, 1.0), max_tokens=10, batch_size=2, seed=7)
    return replace(plain, **changes)  # pyrefly: ignore[bad-argument-type]


def answers(output: Path) -> dict[str, list[dict]]:
    return {path.stem: read_samples(path) for path in sorted((output / "samples").glob("*.jsonl"))}


def without_seconds(found: dict[str, list[dict]]) -> dict[str, list[dict]]:
    return {name: [line | {"batch_seconds": 0} for line in lines] for name, lines in found.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    output = tmp_path_factory.mktemp("whole") / "run"
    run_tasks(model(), {"gsm8k": items()}, config(output), ABOUT)
    _, rows = summarize(output)
    assert [(row.mode, row.temperature, row.answered) for row in rows] == [
        ("ar", 0.0, 4), ("isd", 0.0, 4), ("ar", 1.0, 4), ("isd", 1.0, 4)
    ]  # fmt: skip
    assert all((row.same.right, row.same.total) == (4, 4) for row in rows if row.mode == "isd" and row.same)
    return answers(output)


def test_every_answer_is_the_one_the_model_gives_by_itself(whole: dict[str, list[dict]]) -> None:
    assert sorted(whole) == ["gsm8k_ar_t0", "gsm8k_ar_t1", "gsm8k_isd_t0", "gsm8k_isd_t1"]
    for name, lines in whole.items():
        stride, temperature = 1 if "_ar_" in name else 3, float(name[-1])
        assert {line["id"] for line in lines} == {item.id for item in items()}
        for line in lines:
            number = int(line["id"][1:])
            item = items()[number]
            sampling = idlm_jax.SamplingParams(temperature, seed=7 + number, max_tokens=10)
            # Beside another text, so that the program is compiled already.
            alone, _ = model().generate([model().as_chat(item.prompt), "other"], sampling, stride=stride)
            assert (line["text"], line["tokens"], line["forwards"], line["seed"]) == (
                alone.text, alone.stats.tokens, alone.stats.forwards, 7 + number
            )  # fmt: skip
            assert line["scores"] == item.score(alone.text)
            assert line["tokens_per_forward"] == line["tokens"] / line["forwards"]
            assert len(line["prompt_sha256"]) == 16


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_an_interrupted_run_goes_on_to_the_same_answers(
    batches: int, whole: dict[str, list[dict]], tmp_path: Path
) -> None:
    heard: list[tuple[str, int]] = []

    def stop(cell: str, answered: int) -> None:
        heard.append((cell, answered))
        if sum(count for _, count in heard) >= 2 * batches:
            raise KeyboardInterrupt

    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_tasks(model(), {"gsm8k": items()}, config(output), ABOUT, stop)
    # A kill may also come in the middle of a write.
    for path in (output / "samples").glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:-1]) + (lines[-1][:-9] if lines else ""))
    kept = sum(map(len, answers(output).values()))
    heard.clear()
    run_tasks(model(), {"gsm8k": items()}, config(output), ABOUT, lambda cell, count: heard.append((cell, count)))
    assert sum(count for _, count in heard) == 16
    order = {
        name: sorted(lines, key=lambda line: line["id"]) for name, lines in without_seconds(answers(output)).items()
    }
    assert order == {name: sorted(lines, key=lambda line: line["id"]) for name, lines in without_seconds(whole).items()}
    assert kept <= 2 * batches


def test_what_is_done_is_not_done_again_and_more_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    first = config(output, modes=("ar",), temperatures=(0.0,))
    run_tasks(model(), {"gsm8k": items()}, first, ABOUT)
    before = answers(output)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "generate", lambda *_: pytest.fail("decoded again"))
        run_tasks(model(), {"gsm8k": items()}, first, ABOUT)
    run_tasks(model(), {"gsm8k": items(), "ifeval": items(2)}, replace(first, modes=("isd",)), ABOUT)
    assert sorted(answers(output)) == ["gsm8k_ar_t0", "gsm8k_isd_t0", "ifeval_isd_t0"]
    assert answers(output)["gsm8k_ar_t0"] == before["gsm8k_ar_t0"]


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = config(output, modes=("ar",), temperatures=(0.0,))
    run_tasks(model(), {"gsm8k": items(2)}, first, ABOUT)
    before = answers(output)

    def refused(changed: RunConfig, questions: list[Item], about: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            run_tasks(model(), {"gsm8k": questions}, changed, about)
        assert answers(output) == before

    refused(replace(first, seed=8), items(2), ABOUT, "holds answers with seed 7")
    refused(replace(first, modes=("isd",), max_tokens=11), items(2), ABOUT, "with max_tokens 10")
    refused(first, items(3), ABOUT, "with items 2")
    refused(first, [replace(items(1)[0], prompt="b"), items(2)[1]], ABOUT, "with prompts_sha256")
    refused(first, items(2), {"model": "other", "adapter": None}, "with model tiny")


def test_what_cannot_run_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    def refused(message: str, questions: list[Item] | None = None, **changes: object) -> None:
        with pytest.raises(UserError, match=message):
            run_tasks(model(), {"gsm8k": questions or items()}, config(tmp_path / "run", **changes), ABOUT)
        assert not (tmp_path / "run").exists()

    refused("unknown mode 'risd'.*did you mean 'r-isd'", modes=("risd",))
    refused("the mode r-isd is one of an adapter", modes=("ar", "r-isd"))
    refused("stride 1 is AR", decode=DecodeConfig(stride=1))
    refused("batch_size must be at least 1", batch_size=0)
    refused("temperature must be finite", temperatures=(0.0, -1.0))
    refused("seed must be in", seed=-1)
    refused("gsm8k, question q9: prompt .* exceeds", [Item("q9", "long " * 500, partial(score, wanted=""))])
    with pytest.raises(UserError, match=r"unknown task 'gsm8'.*did you mean 'gsm8k'"):
        read_task("gsm8", None, True)


MODES = ("ar", "r-isd", "isd", "adapted-ar")


def test_modes_are_strides_and_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    monkeypatch.setattr("idlm_jax.model.Decoding", script)
    adapted = LanguageModel(model().model, model().tokenizer, has_adapter=True)
    settings = config(tmp_path, modes=MODES, temperatures=(0.0,))
    run_tasks(adapted, {"ifeval": items(1)}, settings, ABOUT | {"adapter": "tiny"})
    assert [(policy.stride, policy.gated) for policy in script.policies] == [
        (1, True),
        (3, True),
        (3, False),
        (1, False),
    ]


@pytest.mark.slow
def test_modes_decide_where_the_adapter_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = LanguageModel(drafting_model(drafting_adapter(0.3)), model().tokenizer, has_adapter=True)
    # The vocabulary of this model has no chat template's tokens.
    monkeypatch.setattr(adapted, "as_chat", lambda text: text)
    questions = [Item(str(i), text, partial(score, wanted="")) for i, text in enumerate(["!!", '"#', "$%&", "'("])]
    settings = config(tmp_path, decode=DecodeConfig(stride=2), modes=MODES, temperatures=(0.0,), max_tokens=24)
    run_tasks(adapted, {"ifeval": questions}, settings, ABOUT | {"adapter": "tiny"})
    texts = {
        cell.split("_")[1]: {line["id"]: line["text"] for line in found} for cell, found in answers(tmp_path).items()
    }
    assert texts["ar"] == texts["r-isd"] != texts["isd"] == texts["adapted-ar"]
    _, rows = summarize(tmp_path)
    same = {row.mode: row.same and row.same.right for row in rows}
    assert same == {"ar": None, "r-isd": 4, "isd": 4, "adapted-ar": None}


def test_default_modes_are_those_with_the_same_text() -> None:
    assert default_modes(True) == ("ar", "r-isd") and default_modes(False) == ("ar", "isd")
