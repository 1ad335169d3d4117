"""GSM8K: grade-school mathematics, scored by the number an answer ends with, as lm-evaluation-harness does."""

import re
from functools import partial
from pathlib import Path

from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks.item import Item, read_records

# Three worked questions of our own show the form of an answer.
_EXAMPLES = (
    (
        "A shelf has 4 boards and each board holds 12 books. If 9 books are lent out, how many books are left?",
        "The shelf holds 4 * 12 = 48 books. After lending 9 there are 48 - 9 = 39 books left.\n#### 39",
    ),
    (
        "Mara runs 3 km on each weekday and 5 km on each day of the weekend. How far does she run in two weeks?",
        "In one week she runs 5 * 3 = 15 km and 2 * 5 = 10 km, together 25 km. In two weeks that is 2 * 25 = 50 km."
        "\n#### 50",
    ),
    (
        "A pen costs $2 and a notebook costs three times as much. Tom buys 4 pens and 2 notebooks and pays with a $50 "
        "note. How many dollars does he get back?",
        "A notebook costs 3 * 2 = $6. Tom pays 4 * 2 + 2 * 6 = 8 + 12 = $20. He gets back 50 - 20 = $30.\n#### 30",
    ),
)
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def read_items(path: Path | None, chat: bool) -> list[Item]:
    """The questions of a file with the keys ``question`` and ``answer`` ("… #### 42")."""
    if path is None:
        raise UserError("gsm8k needs its questions: gsm8k=test.jsonl (from openai/grade-school-math on GitHub)")
    opening = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in _EXAMPLES)
    items = []
    for number, (where, record) in enumerate(read_records(path, {"question": str, "answer": str})):
        wanted = strict_number(record["answer"])
        if wanted is None:
            raise UserError(f"{where}: the answer has no '#### number'")
        prompt = f"{opening}Question: {record['question']}\nAnswer:"
        items.append(Item(str(number), prompt, partial(_score, wanted=wanted), stop=("Question:",)))
    return items


def _score(answer: str, wanted: str) -> dict[str, bool]:
    return {"flexible": flexible_number(answer) == wanted, "strict": strict_number(answer) == wanted}


def strict_number(text: str) -> str | None:
    """The number after the first ``####``."""
    found = _STRICT.search(text)
    return None if found is None else _plain(found[1])


def flexible_number(text: str) -> str | None:
    """The last number of the text."""
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    """Without what does not change a number: thousands separators, dollar signs, the full stop of the sentence."""
    return number.replace(",", "").replace("$", "").removesuffix(".")
