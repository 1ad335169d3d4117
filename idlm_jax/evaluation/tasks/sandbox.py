"""Runs a program that a model wrote in a process of its own, with little to break and little time to do it.

This keeps accidents small (endless loops, memory, files, the network); it does not hold back a determined attacker.
Where that matters, run the whole evaluation in a container.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 5.0
MEMORY_BYTES = 2**30
_CHILD = Path(__file__).with_name("sandbox_child.py")


def passes(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether a Python program runs to its end within the limits, without an exception and without leaving early.

    The process has a temporary directory, an empty environment and, where the system lets it, no network and no other
    processes to see; it and all it has started are killed when it is over.
    """
    # The program cannot end well by itself: its end is told by a word that it does not have.
    word = secrets.token_hex()
    task = json.dumps({"program": program, "word": word, "seconds": seconds, "memory_bytes": memory_bytes})
    with tempfile.TemporaryDirectory(prefix="idlm-", ignore_cleanup_errors=True) as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"HOME": directory, "TMPDIR": directory, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            # Starting Python takes a moment when all cores are busy.
            said, _ = process.communicate(task.encode(), timeout=seconds + 5)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return said.decode(errors="replace") == word
