"""How far a long job is: a bar on a terminal, a plain line every tenth of the way anywhere else."""

import sys
import time

from tqdm import tqdm

from idlm_jax.checkpoint.atomic import gigabytes

# Jobs shorter than this print nothing.
_QUIET_SECONDS = 2.0


class Progress:
    """A context manager to call with the number of bytes, or of things called ``unit``, just done."""

    def __init__(self, label: str, total: int, unit: str | None = None):
        self._label, self._total, self._done, self._tenths = label, total, 0, 0
        self._goal = gigabytes(total) if unit is None else f"{total} {unit}"
        self._start = time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=label,
            unit="B" if unit is None else f" {unit}",
            unit_scale=unit is None,
            delay=_QUIET_SECONDS,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def __call__(self, size: int) -> None:
        """Count so many more."""
        self._done += size
        self._bar.update(size)
        tenths = 10 * self._done // max(self._total, 1)
        if self._bar.disable and tenths > self._tenths and time.monotonic() - self._start > _QUIET_SECONDS:
            self._tenths = tenths
            print(f"{self._label}: {10 * tenths}% of {self._goal}", file=sys.stderr, flush=True)
