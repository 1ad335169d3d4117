"""The one exception that means "the user can mend this": a single clear line, exit code 2 at the command line."""

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave (a path, a file, a flag, a request) is wrong; the message says what and what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def require_known_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UserError that names the first unknown key of ``where`` and the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")


def require_installed(module: str, extra: str) -> None:
    """Raise UserError that names the extra to install when an optional module is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this needs {module}: pip install 'idlm-jax[{extra}]'")
