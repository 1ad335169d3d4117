"""GSM8K: the numbers that count are those lm-evaluation-harness takes."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks import gsm8k

ANSWER = "She has 2 * 500 = <<2*500=1000>>1,000 eggs.\n#### 1,000"


def item(tmp_path: Path, answer: str = ANSWER) -> gsm8k.Item:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": "How many eggs?", "answer": answer}) + "\n")
    (only,) = gsm8k.read_items(path, chat=True)
    return only


@pytest.mark.parametrize(
    ("answer", "flexible", "strict"),
    [
        ("2 * 500 = 1000.\n#### 1000", True, True),
        ("#### 1,000", True, True),
        ("#### $1,000", True, False),
        ("It is $1,000.", True, False),
        ("#### 1000\nQuestion 7", False, True),
        ("#### 999 and then #### 1000", True, False),
        ("#### 1000.0", False, False),
        ("1000 of 2", False, False),
        ("#### -1000", False, False),
        ("none", False, False),
        ("", False, False),
    ],
)
def test_flexible_is_the_last_number_and_strict_the_one_after_the_marks(
    tmp_path: Path, answer: str, flexible: bool, strict: bool
) -> None:
    assert item(tmp_path).score(answer) == {"flexible": flexible, "strict": strict}


PIECES = st.sampled_from(
    ["#### ", "####", "1,000", "1000", "-1000", "$", ".", ",", " ", "\n", "-", "7", "so ", "1000."]
)


@settings(deadline=None)
@given(text=st.lists(PIECES, max_size=12).map("".join))
def test_scores_are_those_of_lm_evaluation_harness(text: str) -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    def harness(pattern: str, group: int) -> bool:
        (found,) = extraction.RegexFilter(pattern, group_select=group).apply([[text]], [{}])
        ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
        return exact_match_hf_evaluate(found, [ANSWER], regexes_to_ignore=ignored, ignore_case=True)["exact_match"] == 1

    wanted = {
        "flexible": harness(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
        "strict": harness(r"#### (\-?[0-9\.\,]+)", 0),
    }
    assert gsm8k._score(text, "1000") == wanted


def test_the_prompt_shows_solved_questions_before_the_one_to_answer(tmp_path: Path) -> None:
    prompt = item(tmp_path).prompt
    assert prompt.endswith("\n\nQuestion: How many eggs?\nAnswer:")
    for question, answer in gsm8k._EXAMPLES:
        assert f"Question: {question}\nAnswer: {answer}\n\n" in prompt
        assert gsm8k.strict_number(answer) == gsm8k.flexible_number(answer)
    assert item(tmp_path).stop == ("Question:",)


def test_what_is_no_question_is_refused_by_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test.jsonl:1: the answer has no '#### number'"):
        item(tmp_path, "1000")
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "?", "answer": "#### 1"}\n\n{"question": "?"}\n')
    with pytest.raises(
        UserError, match=r"bad.jsonl:3: expected an object with the keys question, answer; see 'answer'"
    ):
        gsm8k.read_items(path, chat=True)
    with pytest.raises(UserError, match="gsm8k needs its questions"):
        gsm8k.read_items(None, chat=True)
