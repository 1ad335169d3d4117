"""How much of the time a device waits: gaps between kernels in a trace by the JAX profiler."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

# Between the kernels of one program there are a few microseconds; where the device waits for the host, there are more.
HOST_GAP = 50.0


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """The events of a trace made with ``create_perfetto_trace``."""
    file = next(folder.rglob("perfetto_trace.json.gz"))
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def idle_shares(events: list[dict[str, Any]], between: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float] | None:
    """Share of the time without a kernel: in all, and in gaps of HOST_GAP µs or more.

    ``between`` is the part of the time from first to last kernel that counts, as shares of it. Kernels of several
    streams may overlap. None where no kernel ran on a stream of a device, as on CPU.
    """
    named = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("name") in named:
            named[event["name"]][event["pid"], event.get("tid", 0)] = event["args"]["name"]
    devices = {pid for (pid, _), name in named["process_name"].items() if name.startswith("/device:")}
    # Other lines of a device are of whole programs, which hide the gaps.
    streams = {at for at, name in named["thread_name"].items() if at[0] in devices and name.startswith("Stream")}
    ran = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and (e["pid"], e["tid"]) in streams]
    if not ran:
        return None
    begins, ends = np.array(sorted(ran), np.float64).T
    first, last = begins[0] + np.array(between) * (ends.max() - begins[0])
    within = (begins >= first) & (begins <= last)
    begins, ends = begins[within], ends[within]
    if not len(begins):
        return None
    ended = np.maximum.accumulate(ends)
    gaps = np.maximum(begins[1:] - ended[:-1], 0)
    whole = ended[-1] - begins[0]
    return float(gaps.sum() / whole), float(gaps[gaps >= HOST_GAP].sum() / whole)
