"""IFEval: our prompts can be checked, right and wrong answers are told apart, and what cannot be checked is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks import ifeval

pytest.importorskip("if_verifiable")

# Beginning of a prompt of ours -> an answer that follows it, and one that does not.
ANSWERS = {
    "Describe a thunderstorm": ("Thunder rolls.", "Thunder rolls. " * 30),
    "Write a short note": ("Our cat is gone.", "Our cat, Tom, is gone."),
    "Name three good reasons": ("it is fun and safe and it keeps you healthy.", "It is fun."),
    "Write a warning sign": ("DANGER! THIN ICE. DO NOT WALK ON THE LAKE.", "Danger! Thin ice."),
    "Describe how bread is made": ("Mix flour and yeast, then the oven.", "Mix flour and water."),
    "Describe winter": ("Frost on every branch.", "It is cold."),
    "What is the capital": ("La capitale de la France est la ville de Paris.", "The capital of France is Paris."),
    "Explain how a bicycle": ("It rolls.\n***\nIt steers.", "It rolls.\n\nIt steers."),
    "List what to pack": ("* map\n* water\n* knife\n* rope", "* map\n* water\n* knife"),
    "Is a tomato": ("My answer is yes.", "Yes, it is."),
    "Describe a book": ('{"title": "Moby Dick"}', "Moby Dick by Melville"),
    "Repeat this request": (
        "Repeat this request word for word before you answer it, then answer: What makes a rainbow?\nLight and rain.",
        "Light and rain.",
    ),
    "Describe the desert": ("Stars above dunes. That is all I saw.", "That is all I saw. Or not."),
    "Say something kind": ('"A fresh start for everyone."', "A fresh start."),
    "Suggest a name": ("Crumbs\n******\nThe Warm Oven", "Crumbs"),
}


def record(**changes: Any) -> dict[str, Any]:
    plain = {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return plain | changes


def read(tmp_path: Path, *records: dict[str, Any]) -> list[ifeval.Item]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return ifeval.read_items(path, chat=True)


def test_our_prompts_can_all_be_checked() -> None:
    items = ifeval.read_items(None, chat=True)
    assert len(items) == len({item.prompt for item in items}) >= 36
    for item in items:
        assert item.score("") == {"prompt strict": False, "prompt loose": False}
        assert item.score("x, A. " * 100) == item.score("x, A. " * 100)


@pytest.mark.parametrize("beginning", ANSWERS)
def test_what_follows_the_instructions_is_told_from_what_does_not(beginning: str) -> None:
    (item,) = [item for item in ifeval.read_items(None, chat=True) if item.prompt.startswith(beginning)]
    good, bad = ANSWERS[beginning]
    assert item.score(good) == {"prompt strict": True, "prompt loose": True}
    assert item.score(bad)["prompt strict"] is False


def test_loose_forgives_a_line_around_the_answer(tmp_path: Path) -> None:
    (item,) = read(tmp_path, record())
    assert item.score("Sure, here it is:\nno pause here") == {"prompt strict": False, "prompt loose": True}


def test_all_instructions_of_a_prompt_must_be_followed(tmp_path: Path) -> None:
    both = record(
        instruction_id_list=["punctuation:no_comma", "length_constraints:number_words"],
        kwargs=[{"num_words": None}, {"num_words": 3, "relation": "at least", "keywords": None}],
    )
    (item,) = read(tmp_path, both)
    assert item.score("one two three")["prompt strict"]
    assert not item.score("one two")["prompt strict"] and not item.score("one, two, three")["prompt strict"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction_id_list": ["punctuation:no_coma"]}, "did you mean 'punctuation:no_comma'"),
        ({"instruction_id_list": ["length_constraints:number_words"]}, "lack 'num_words'"),
        ({"kwargs": []}, "1 instructions with 0 kwargs"),
        ({"prompt": 3}, "see 'prompt'"),
    ],
)
def test_what_would_be_skipped_or_made_up_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"prompts.jsonl:2: .*{message}"):
        read(tmp_path, record(), record(**changes))


def test_instructions_that_need_data_of_nltk_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ifeval, "_has_nltk_data", lambda: False)
    sentences = record(
        instruction_id_list=["length_constraints:number_sentences"],
        kwargs=[{"num_sentences": 2, "relation": "at least"}],
    )
    with pytest.raises(UserError, match="data of NLTK"):
        read(tmp_path, sentences)
