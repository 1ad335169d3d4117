"""The process of ``sandbox.py``: reads a program and its limits on stdin, and says the given word if it ran well.

It is run by its path in an isolated interpreter, so it imports nothing but the standard library.
"""

import contextlib
import json
import os
import resource
import signal
import sys

_LARGEST_FILE = 2**20
_OPEN_FILES = 32


def main() -> None:
    """Set the limits, run the program, say the word."""
    task = json.load(sys.stdin)
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    _leave_the_system()
    _limit(task["seconds"], task["memory_bytes"])
    exec(compile(task["program"], "program", "exec"), {"__name__": "program"})
    os.write(report, task["word"].encode())
    os._exit(0)


def _leave_the_system() -> None:
    """No network, and processes of its own that end with the first of them; not every system allows it."""
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID)
    except (AttributeError, OSError):
        return
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)


def _limit(seconds: float, memory_bytes: int) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: _LARGEST_FILE,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
