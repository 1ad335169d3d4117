"""IFEval: instructions whose following a program can check, by the checkers of the package ``if-verifiable``.

Files have the keys of the official one (google/IFEval, which the package does not carry). ifeval_prompts.jsonl beside
this module holds prompts of our own, under the MIT licence.
"""

import threading
from functools import partial
from pathlib import Path
from typing import Any

from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.evaluation.tasks.item import Item, import_extra, read_records

PROMPTS = Path(__file__).with_name("ifeval_prompts.jsonl")
_FIELDS = {"prompt": str, "instruction_id_list": list, "kwargs": list}
# Instructions whose checkers cut text into sentences or words with data that NLTK downloads.
_NEED_NLTK_DATA = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
# Language detection, which some checkers use, is not made for threads.
_one_at_a_time = threading.Lock()


def read_items(path: Path | None, chat: bool) -> list[Item]:
    """The prompts of a file, by default our own."""
    import_extra("if_verifiable", "ifeval")
    # Otherwise it guesses another language now and then.
    import_extra("langdetect", "ifeval").DetectorFactory.seed = 0
    items = []
    for number, (where, record) in enumerate(read_records(path or PROMPTS, _FIELDS)):
        _check(where, record)
        items.append(Item(str(record.get("key", number)), record["prompt"], partial(_score, record=record)))
    return items


def _score(answer: str, record: dict[str, Any]) -> dict[str, bool]:
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval import INSTRUCTION_DICT

    with _one_at_a_time:
        _, scores = evaluate_instructions(
            response=answer,
            instruction_id_list=record["instruction_id_list"],
            kwargs_list=record["kwargs"],
            prompt=record["prompt"],
            instruction_registry=INSTRUCTION_DICT,
        )
    return {"prompt strict": scores.binary_strict == 1, "prompt loose": scores.binary_loose == 1}


def _check(where: str, record: dict[str, Any]) -> None:
    """Raise UserError for what the checkers would skip without a word, or make up at random."""
    from if_verifiable.ifeval import INSTRUCTION_DICT

    ids, all_arguments = record["instruction_id_list"], record["kwargs"]
    if not ids or len(ids) != len(all_arguments):
        raise UserError(
            f"{where}: {len(ids)} instructions with {len(all_arguments)} kwargs; expected as many, and some"
        )
    for name, arguments in zip(ids, all_arguments, strict=True):
        if name not in INSTRUCTION_DICT:
            raise UserError(f"{where}: unknown instruction '{name}'{did_you_mean(str(name), INSTRUCTION_DICT)}")
        missing = [
            key for key in INSTRUCTION_DICT[name](name).get_instruction_args_keys() if arguments.get(key) is None
        ]
        if missing:
            raise UserError(f"{where}: the kwargs of '{name}' lack '{missing[0]}'")
        if name in _NEED_NLTK_DATA and not _has_nltk_data():
            raise UserError(f"{where}: '{name}' needs data of NLTK: python -m nltk.downloader punkt_tab")


def _has_nltk_data() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
