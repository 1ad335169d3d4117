"""What every task is made of: questions, each with a function that scores an answer."""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from idlm_jax.data.chat import read_lines
from idlm_jax.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    # Unique in its task.
    id: str
    # What the user says; a model without a chat template continues it.
    prompt: str
    # Whether an answer is right, by each of the task's measures; the first one counts most. Called from many threads.
    score: Callable[[str], dict[str, bool]]
    # The answer ends before the first of these.
    stop: tuple[str, ...] = ()


def read_records(path: Path, fields: Mapping[str, type]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its place for messages (``file:line``).

    Raises UserError for a file that cannot be read or is empty, and for a line that lacks one of ``fields``.
    """
    records = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        for name, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise UserError(f"{where}: expected an object with the keys {', '.join(fields)}; see '{name}'")
        records.append((where, record))
    if not records:
        raise UserError(f"{path}: the file is empty")
    return records


def import_extra(module: str, task: str) -> ModuleType:
    """A module of the extra ``eval``; raises UserError that names the extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{task} needs {error.name}: pip install 'idlm-jax[eval]'") from None
