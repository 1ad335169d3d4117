"""Synthesis: documents are what the decoder says to each request alone, in one order, whatever the batch or a kill."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idlm_jax.checkpoint.open import open_source
from idlm_jax.cli import data_synthesize as verb
from idlm_jax.data import synthesize as module
from idlm_jax.data.synthesize import Author, ChatFrame, Progress, SynthesisConfig, pools, synthesize
from idlm_jax.data.tokens import TokenStore
from idlm_jax.decoding.admission import Answer, Request
from idlm_jax.decoding.generate import generate_tokens
from idlm_jax.decoding.refill import Pool
from idlm_jax.errors import UserError
from idlm_jax.model import LanguageModel, load
from tests.cli.decoding_support import TINY, json_lines, refused, run, write

END = "<|im_end|>"
PREFIX = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
HEADER = "\n<|im_start|>assistant\n"
CONFIG = SynthesisConfig(documents=12, max_tokens=84, batch_size=5, seed=3)
PROMPTS = [[{"role": "user", "content": text}] for text in ("hello", "12", "and then", "x" * 60)]


@cache
def model() -> LanguageModel:
    """The tiny model, made to end its turns after some 20 tokens."""
    loaded = load(TINY, dtype="float32", mask_token="0")
    head = loaded.model.lm_head
    assert head is not None
    head[...] = head[...].at[:, loaded.config.eos_token_ids[0]].multiply(3)
    return loaded


def sample(target: Path, config: SynthesisConfig = CONFIG, prompts: Any = None, **options: Any) -> TokenStore:
    return synthesize(model(), target, config, prompts, name="tiny", **options)


def contents(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [
        (document.tokens.tolist(), document.loss_mask.tolist())
        for document in map(store.__getitem__, range(len(store)))
    ]


@cache
def alone(config: SynthesisConfig, with_prompts: bool = False) -> list[Any]:
    """What becomes of documents when each request is decoded by itself: samples, and None for dropped ones."""
    author = Author(model(), config, PROMPTS if with_prompts else None)
    outcomes = []
    for number in range(author.available or 40):
        following: Any = author.first_request(number)
        while isinstance(following, Request):
            (emission,) = generate_tokens(model().model, [following.prompt], [following.sampling], config.policy())
            following = author.go_on(Answer(following, emission))
        outcomes.append(following)
    return outcomes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return sample(tmp_path_factory.mktemp("synthesis") / "store")


def test_documents_are_those_of_each_request_alone_in_order(store: TokenStore) -> None:
    kept = [outcome for outcome in alone(CONFIG) if outcome is not None][:12]
    assert contents(store) == [(s.document.tokens.tolist(), s.document.loss_mask.tolist()) for s in kept]
    assert len({tuple(tokens) for tokens, _ in contents(store)}) == 12
    counts = store.metadata["counts"]
    last = next(i for i, outcome in enumerate(alone(CONFIG)) if outcome is kept[-1])
    assert counts["dropped_documents"] == sum(outcome is None for outcome in alone(CONFIG)[:last]) > 0
    assert counts["cut_documents"] == sum(s.cut for s in kept) > 0
    assert counts["sampled_tokens"] == sum(s.sampled_tokens for s in kept)


def test_documents_follow_the_template_and_answers_are_targets(store: TokenStore) -> None:
    tokenizer = model().tokenizer
    for i in range(len(store)):
        tokens, loss_mask = store[i]
        opening = tokenizer.decode(tokens[~loss_mask])
        assert opening.startswith(PREFIX) and opening.endswith(END + HEADER)
        question = opening.removeprefix(PREFIX).removesuffix(END + HEADER)
        # The targets are one run at the end; a document that was not cut ends with the token that ends the turn.
        assert question and loss_mask.argmax() + loss_mask.sum() == len(tokens) <= CONFIG.max_tokens
        ended = tokens[-1] == model().config.eos_token_ids[0]
        assert ended or len(tokens) == CONFIG.max_tokens


def test_the_sampled_loss_adds_the_question_and_its_end(store: TokenStore, tmp_path: Path) -> None:
    other = sample(tmp_path / "store", replace(CONFIG, loss="sampled"))
    tokenizer = model().tokenizer
    for (tokens, answers), (same, sampled) in zip(contents(store), contents(other), strict=True):
        assert same == tokens
        template = tokenizer.decode(np.array(tokens)[~np.array(sampled)])
        assert template == PREFIX + HEADER
        assert np.array(sampled)[np.array(answers)].all()
    assert other.metadata["counts"]["target_tokens"] == other.metadata["counts"]["sampled_tokens"]


@pytest.mark.parametrize("stride", [1, 4])
def test_batch_pools_and_stride_change_nothing(
    stride: int, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pools", lambda config, copies: [Pool(2, 50), Pool(1, 70), Pool(1, config.max_tokens)])
    assert contents(sample(tmp_path / "store", replace(CONFIG, stride=stride))) == contents(store)


def test_other_seeds_make_other_documents(store: TokenStore, tmp_path: Path) -> None:
    other = sample(tmp_path / "store", replace(CONFIG, seed=4, documents=3))
    assert not {tuple(tokens) for tokens, _ in contents(other)} & {tuple(tokens) for tokens, _ in contents(store)}


def test_tokens_end_a_synthesis_with_the_document_that_reaches_them(store: TokenStore, tmp_path: Path) -> None:
    kept = [outcome for outcome in alone(CONFIG) if outcome is not None]
    goal = sum(s.sampled_tokens for s in kept[:4]) + 1
    other = sample(tmp_path / "store", replace(CONFIG, documents=None, tokens=goal))
    assert contents(other) == contents(store)[:5]


class Killed(BaseException):
    """Not an error that anything may handle."""


def kill_after(calls: int, error: type[BaseException]) -> Callable[[Progress], None]:
    left = [calls]

    def on_progress(progress: Progress) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    return on_progress


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("flush_seconds", [0.0, 1e9])
def test_a_killed_run_resumes_to_the_same_store(
    error: type[BaseException], flush_seconds: float, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", flush_seconds)
    target = tmp_path / "store"
    saved = []
    for calls in (14, 9):
        with pytest.raises(error):
            sample(target, resume=True, on_progress=kill_after(calls, error))
        progress = target.with_name("store.partial") / "progress.json"
        saved.append(json.loads(progress.read_text())["counts"]["documents"] if progress.exists() else 0)
    kept = flush_seconds == 0 or error is KeyboardInterrupt
    assert (0 < saved[0] <= saved[1] < 12) if kept else saved == [0, 0]
    resumed = sample(target, replace(CONFIG, batch_size=3), resume=True)
    assert contents(resumed) == contents(store)
    assert resumed.metadata["counts"] == store.metadata["counts"]


def test_prompts_are_answered_in_order_several_times_each(tmp_path: Path) -> None:
    config = SynthesisConfig(max_tokens=104, batch_size=4, samples_per_prompt=3)
    store = sample(tmp_path / "store", config, PROMPTS)
    outcomes = alone(config, True)
    assert outcomes[9:] == [None] * 3, "the last prompt leaves no room for an answer"
    kept = [s for s in outcomes if s is not None]
    assert contents(store) == [(s.document.tokens.tolist(), s.document.loss_mask.tolist()) for s in kept]
    assert len(kept) == 9 and len({tuple(tokens) for tokens, _ in contents(store)}) == 9
    openings = [model().tokenizer.decode(store[i].tokens[~store[i].loss_mask]) for i in range(9)]
    assert openings == [PREFIX + chat[0]["content"] + END + HEADER for chat in PROMPTS[:3] for _ in range(3)]
    assert store.metadata["counts"]["dropped_documents"] == 3


@pytest.mark.parametrize("name", ["models/smollm2", str(TINY)])
def test_the_frame_of_a_question_is_what_the_template_renders_around_it(name: str) -> None:
    if not Path(name).exists():
        pytest.skip("the model is not there")
    tokenizer = open_source(name).tokenizer()
    frame = ChatFrame.of(tokenizer)
    ids = tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], add_generation_prompt=True, tokenize=False
    )
    assert [*frame.prefix, *ids, frame.end, *frame.header] == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("batch", [1, 7, 8, 64, 1000, 2048])
def test_pools_have_a_place_for_every_document(batch: int) -> None:
    config = SynthesisConfig(tokens=1, batch_size=batch, max_tokens=1024)
    sizes = pools(config)
    assert sum(pool.places for pool in sizes) == batch and sizes[-1].capacity == 1024
    assert [pool.capacity for pool in sizes] == sorted({pool.capacity for pool in sizes})


def test_copies_of_the_model_split_places_of_one_size_evenly() -> None:
    config = SynthesisConfig(tokens=1, batch_size=48, max_tokens=1024)
    assert pools(config, 4) == [Pool(48, 1024)]
    with pytest.raises(UserError, match="batch_size 48 cannot be split over 32 copies of the model"):
        pools(config, 32)


BAD_SETTINGS = [
    (dict(tokens=None, documents=None), "without prompts there is no end"),
    (dict(tokens=5), "give documents or tokens, not both"),
    (dict(documents=0), "documents must be at least 1, not 0"),
    (dict(batch_size=0), "batch_size must be at least 1, not 0"),
    (dict(temperature=0.0), "at temperature 0 every sample of a prompt is the same"),
    (dict(temperature=-1.0), "temperature must be finite and not negative"),
    (dict(top_p=0.0), "top_p must be in (0, 1]"),
    (dict(seed=-1), "seed must be in"),
    (dict(stride=17), "stride must be in 1 … 16"),
    (dict(loss="sample"), "unknown loss 'sample' (one of assistant, sampled); did you mean 'sampled'?"),
    (dict(max_tokens=4096), "documents of 4096 tokens exceed the model's context of 128"),
    (dict(max_tokens=53), "documents of 53 tokens hold little beside the template's 52"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        sample(tmp_path / "store", replace(CONFIG, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_writes_no_chats_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HOPELESS", 20)
    # No room for a question and the token that ends it.
    with pytest.raises(UserError, match=r"none of 2\d documents had a question and an answer"):
        sample(tmp_path / "store", replace(CONFIG, max_tokens=54))


def test_a_template_without_end_of_question_is_refused() -> None:
    tokenizer = open_source(TINY).tokenizer()
    tokenizer.chat_template = "Q: {{ messages[0].content }}\nA:"
    with pytest.raises(UserError, match="ends a question with no special token"):
        ChatFrame.of(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatFrame.of(tokenizer)


COMMAND = ("data", "synthesize", TINY, "--max-tokens", 60, "--batch-size", 4)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": "12"}, {"messages": [{"role": "user", "content": "and"}]}]
    return write(tmp_path / "prompts.jsonl", "\n".join(map(json.dumps, lines)))


def test_the_command_prints_counts_and_leaves_a_store(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (*COMMAND, "--prompts", prompts, "--samples-per-prompt", 2, "--output")
    code, out, _ = run(capsys, *command, tmp_path / "a", "--json")
    (printed,) = json_lines(out)
    store = TokenStore.open(tmp_path / "a")
    assert code == 0 and printed["counts"] == store.metadata["counts"] and len(store) == 4
    assert printed["path"] == str(tmp_path / "a") and printed["tokens_per_second"] > 0
    assert store.metadata["settings"]["model"] == TINY.name and str(tmp_path) not in json.dumps(store.metadata)
    code, out, _ = run(capsys, *command, tmp_path / "b", "--seed", 1, "--loss", "sampled")
    assert code == 0 and "documents cut" in out and "sampled tokens a second" in out
    assert contents(TokenStore.open(tmp_path / "b")) != contents(store)
    # Prompts that run out before the tokens are there: what there is, and a word about it.
    code, _, err = run(capsys, *command, tmp_path / "c", "--tokens", 1e6)
    assert code == 0 and contents(TokenStore.open(tmp_path / "c")) == contents(store)
    assert "every prompt is answered: that makes fewer than 1000000 tokens" in err


def test_an_interrupted_command_says_how_to_go_on_and_does(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*COMMAND, "--batch-size", 1, "--prompts", prompts, "--output", tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(verb._Display, "__call__", staticmethod(kill_after(2, KeyboardInterrupt)))
        code, _, err = run(capsys, *command)
    assert code == 130 and "--resume goes on" in err
    assert "resume it" in refused(capsys, *command)
    assert "begun with another seed (0, now 1)" in refused(capsys, *command, "--resume", "--seed", 1)
    assert run(capsys, *command, "--resume")[0] == 0
    assert "exists already" in refused(capsys, *command, "--resume")


BAD_COMMANDS = [
    ((), "without prompts there is no end"),
    (("--tokens", 1.5), "--tokens must be a whole number, not 1.5"),
    (("--prompts", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
    (("--documents", 1, "--stride", 4), "give --mask-token TEXT_OR_ID"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_COMMANDS, ids=[message for _, message in BAD_COMMANDS])
def test_commands_that_cannot_work_are_refused_in_one_line(
    flags: tuple[object, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *COMMAND, "--output", tmp_path / "store", *flags)
