"""A program passes only by running to its end; whatever else it does, it is over soon and leaves nothing behind."""

import os
import time
from pathlib import Path

import pytest

from idlm_jax.evaluation.tasks.sandbox import passes


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "print('a' * 10**6)",
        "import math, re, collections\nassert math.gcd(4, 6) == 2",
        "if __name__ == '__main__':\n    raise ValueError",
    ],
)
def test_a_program_without_error_passes(program: str) -> None:
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def broken(:",
        "input()",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "print('passed')\nraise ValueError",
        "def f(): return f()\nf()",
        "open('big', 'wb').write(bytes(2**22))",
    ],
)
def test_a_program_that_fails_or_leaves_early_does_not_pass(program: str) -> None:
    assert not passes(program)


def test_memory_is_limited() -> None:
    program = "x = bytearray(300 * 2**20)"
    assert passes(program)
    assert not passes(program, memory_bytes=200 * 2**20)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(60)",
    ],
)
def test_time_is_limited(program: str) -> None:
    began = time.monotonic()
    assert not passes(program, seconds=0.5)
    assert time.monotonic() - began < 12


def test_its_directory_and_its_processes_are_gone_afterwards(tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = f"import os\nopen({str(said)!r}, 'w').write(os.getcwd())\nos.mkdir('a')\nopen('a/b', 'w').write('c')"
    assert passes(program)
    directory = said.read_text()
    assert directory != os.getcwd() and not Path(directory).exists()
    late = tmp_path / "late"
    passes(f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(late)!r}, 'w').close()\nos._exit(0)")
    time.sleep(1.5)
    assert not late.exists()


def test_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    assert passes("import os\nassert 'A_SECRET' not in os.environ")
