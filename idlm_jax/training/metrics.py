"""Numbers of a run: ``metrics.jsonl``, what the terminal shows meanwhile, the curves at the end, and how much of the
device was used.
"""

import errno
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from tqdm import tqdm

from idlm_jax.backbone.adapter import TARGET_MODULES
from idlm_jax.backbone.weights import layer_weights
from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError, require_installed
from idlm_jax.plots import AMBER, BLUE, DARK, GREY, ORANGE, PINK, new_figure, require_matplotlib, shade, tidy, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE, CURVES = "metrics.jsonl", "loss_curve.png"
# Off a terminal: lines a run, and the most seconds between two.
_LINES, _LINE_SECONDS = 20, 30.0
# Steps whose median time the speed is computed from.
_SPEED_STEPS = 20
_LOSS_COLORS = {"noisy": ORANGE, "ce": ORANGE, "kl": AMBER, "tv": PINK, "clean": BLUE}
# Dense bf16 FLOP/s of a device, by how its kind begins; first match. Others have no MFU.
_PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class RunLog:
    """A JSON line a step in ``output``/metrics.jsonl, a bar or plain lines on stderr; a context manager."""

    def __init__(
        self,
        output: Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        process_index: int = 0,
        tensorboard: bool = False,
    ):
        """Lines of steps after ``resume_step``, which are done again, are dropped. Only process 0 writes and shows.

        Raises UserError where what draws the curves, or with ``tensorboard`` what writes its files, is not installed.
        """
        require_matplotlib()
        if tensorboard:
            require_installed("tensorboardX", "tensorboard")
        self._writes = process_index == 0
        self._total = total_steps
        self._shown_at = time.monotonic()
        # The first step logged and when: the time left is told by the steps after it, without its compilation.
        self._first: tuple[int, float] | None = None
        self._shown_step: int | None = None
        self._acceptance = ""
        if not self._writes:
            return
        path = output / FILE
        kept = [entry for entry in read_metrics(output) if entry["step"] <= resume_step]
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = path.open("ab", buffering=0)
        self._lines_lost = 0
        self._board = _open_board(output / "tensorboard", resume_step) if tensorboard else None
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._file.close()
            self._bar.close()
            if self._board:
                self._board.close()

    def log(self, step: int, values: Mapping[str, float | Sequence[float] | str]) -> None:
        """Write the numbers of a step (from 1), and names; numbers that are none become null."""
        if not self._writes:
            return
        numbers = {name: _plain(value) for name, value in values.items()}
        self._append(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}) + "\n")
        if self._board:
            for name, value in _scalars(numbers):
                self._board.add_scalar(name, value, step)
        if values.get("acceptance"):
            self._acceptance = "/".join(f"{_nan(share):.2f}" for share in numbers["acceptance"])
        self._show(step, numbers)

    def _append(self, line: str) -> None:
        """Write a line whole or not at all: a full disk costs lines, not the run."""
        data, end = line.encode(), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(end)
            if not self._lines_lost:
                tqdm.write(f"cannot write {self._file.name} ({error.strerror}); training goes on", file=sys.stderr)
            self._lines_lost += 1
            return
        if self._lines_lost:
            tqdm.write(f"{self._file.name} is written again; {self._lines_lost} steps are missing", file=sys.stderr)
            self._lines_lost = 0

    def _show(self, step: int, numbers: dict[str, Any]) -> None:
        shown = {"loss": f"{_nan(numbers.get('loss')):.4f}"}
        if numbers.get("tokens_per_second"):
            shown["tokens/s"] = f"{numbers['tokens_per_second']:,.0f}"
        if numbers.get("mfu"):
            shown["MFU"] = f"{numbers['mfu']:.1%}"
        if self._acceptance:
            shown["acceptance"] = self._acceptance
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        is_due = self._shown_step is None or step - self._shown_step >= self._total / _LINES or step == self._total
        if is_due or now - self._shown_at >= _LINE_SECONDS:
            self._shown_step, self._shown_at = step, now
            parts = [f"{name} {value}" for name, value in shown.items()]
            first, began = self._first
            if step > first:
                parts.append(f"{tqdm.format_interval((now - began) / (step - first) * (self._total - step))} left")
            print(f"step {step}/{self._total}: {', '.join(parts)}", file=sys.stderr, flush=True)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl in order; a last line that a kill cut off is left out, no file is no entries.

    Raises UserError for any other line that cannot be read.
    """
    path = output / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
            entries[-1]["step"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not an entry of `idlm train`; remove the line, or the file") from None
    return entries


def plot(output: Path) -> Path | None:
    """Draw loss_curve.png from metrics.jsonl: losses, held-out acceptance where measured, learning rate.

    Returns its path, or None when no step was logged.
    """
    entries = read_metrics(output)
    if not entries:
        return None
    measured = [entry for entry in entries if entry.get("acceptance")]
    heights = [3, 2, 1] if measured else [3, 1]
    figure = new_figure(9, 1.4 * sum(heights))
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_losses(axes[0], entries)
    if measured:
        _draw_acceptance(axes[1], measured)
    axes[-1].plot([entry["step"] for entry in entries], _series(entries, "learning_rate"), color=DARK)
    axes[-1].set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes:
        tidy(axis)
        for begin, _ in _stages(entries)[1:]:
            axis.axvline(entries[begin]["step"] - 0.5, color=GREY, linewidth=0.8, linestyle="--")
    write_file(output / CURVES, to_png(figure))
    return output / CURVES


class Throughput:
    """Speed of a run: from the median time of its last steps, so that pauses to measure or to save do not count."""

    def __init__(self, devices: int):
        """``devices`` is the number of devices of the whole run, all of the kind of the first one here."""
        peak = peak_flops(jax.local_devices()[0])
        self._peak = None if peak is None else peak * devices
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=_SPEED_STEPS)

    def step(self, tokens: int, flops: float) -> dict[str, float]:
        """Call once a step, with its tokens and useful FLOPs of all devices; what can be known of:

        ``step_seconds`` (since the last call), ``tokens_per_second``, ``mfu`` (share of the peak; known devices only),
        ``peak_memory_bytes`` (the most on any device of this process; where the backend tells).
        """
        now = time.monotonic()
        values: dict[str, float] = {}
        if self._last is not None:
            self._seconds.append(now - self._last)
            seconds = statistics.median(self._seconds)
            values = {"step_seconds": now - self._last, "tokens_per_second": tokens / seconds}
            if self._peak is not None:
                values["mfu"] = flops / seconds / self._peak
        self._last = now
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        used = [device["peak_bytes_in_use"] for device in stats if "peak_bytes_in_use" in device]
        if used:
            values["peak_memory_bytes"] = max(used)
        return values


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 FLOP/s of a device by its data sheet, or None for one we do not know."""
    return next((peak for kind, peak in _PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


def document_tokens(segment_ids: np.ndarray, positions: np.ndarray) -> tuple[int, float]:
    """Of packed rows [B, L]: tokens that are no padding, and the mean length of the document that a token is in."""
    present = segment_ids > 0
    tokens = int(present.sum())
    # A token at position p sees p + 1 tokens, (length + 1) / 2 on average.
    return tokens, 2 * float((positions + 1)[present].mean()) - 1 if tokens else 0.0


def useful_flops(
    config: ModelConfig,
    mode: str,
    *,
    tokens: int,
    noisy_rows: int,
    length: float,
    block_size: int,
    clean_rows: int,
    rank: int = 0,
    target_modules: Sequence[str] = tuple(TARGET_MODULES),
    soft: bool = False,
    again: bool = False,
) -> float:
    """FLOPs that a training step cannot do without; what is computed again, or for rows without loss, does not count.

    With ``again`` the layers' forward pass counts twice where there is a gradient: so much is done without storing.

    ``tokens`` pass through the clean stream, ``noisy_rows`` (those with loss) through the noisy one; ``clean_rows`` of
    the former carry loss. ``length`` is the mean length of the document that a token is in (``document_tokens``);
    groups may start anywhere in it, so rows of both streams see (length + 1) / 2 keys on average.

    A weight costs 2 a row forward, 2 for the gradient of its input and 2 for its own, if it is trained; attention costs
    4 · heads · head_dim a visible pair forward, and as much for each of (queries) and (keys and values) backward.

    - ``ar``, ``full``: all of it, in every stream there is. ``lora``: no gradients of the base's weights.
    - ``gated-lora``: the clean stream forward alone; keys and values in the noisy stream get gradients inside the
      groups only; ``soft`` losses need the logits of the clean rows, which the other modes have for their clean loss.

    Norms, RoPE, softmax and the optimizer are left out; weights frozen by pattern count as trained.
    """
    kernels = {w.path.split(".")[-2]: w.shape for w in layer_weights(config, 0) if len(w.shape) == 2}
    layers, heads_dim = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    body = 2 * layers * sum(inputs * outputs for inputs, outputs in kernels.values())
    head = 2 * config.hidden_size * config.vocab_size
    lora = 2 * layers * rank * sum(sum(kernels[name]) for name in target_modules)
    keys = (length + 1) / 2
    pair = 4 * layers * heads_dim
    if mode == "gated-lora":
        clean = tokens * (body + pair * keys)
        a_row = 2 * body + 3 * lora + pair * (2 * keys + (block_size + 1) / 2)
        noisy = noisy_rows * (a_row + again * (body + lora + pair * keys))
        return clean + noisy + noisy_rows * head * (3 if soft else 2)
    passes = 2 if mode == "lora" else 3
    lora *= mode == "lora"
    a_row = passes * body + 3 * pair * keys + 3 * lora + again * (body + pair * keys + lora)
    rows = tokens if mode == "ar" else tokens + noisy_rows
    with_loss = clean_rows if mode == "ar" else clean_rows + noisy_rows
    return rows * a_row + with_loss * passes * head


def _open_board(directory: Path, resume_step: int) -> Any:
    from tensorboardX import SummaryWriter  # pyrefly: ignore[missing-import]

    return SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [_plain(part) for part in value]
    return value if math.isfinite(value) else None


def _scalars(numbers: dict[str, Any]) -> list[tuple[str, float]]:
    flat = []
    for name, value in numbers.items():
        parts = {f"{name}/{i}": part for i, part in enumerate(value, 1)} if isinstance(value, list) else {name: value}
        flat += [(key, part) for key, part in parts.items() if isinstance(part, int | float)]
    return flat


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _series(entries: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([_nan(entry.get(name)) for entry in entries])


def _stages(entries: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(begin, end) of the entries of each stage."""
    settings = [(entry.get("stage"), entry.get("block_size")) for entry in entries]
    begins = [i for i in range(len(entries)) if i == 0 or settings[i] != settings[i - 1]]
    return list(zip(begins, [*begins[1:], len(entries)], strict=True))


def _draw_losses(axis: "Axes", entries: list[dict[str, Any]]) -> None:
    """Each loss faintly as it is, and its running mean over a fiftieth of the run, in every stage anew."""
    steps = [entry["step"] for entry in entries]
    stages = _stages(entries)
    labels: set[str] = set()
    for name, label in (("loss_noisy", "noisy"), ("loss_clean", "clean")):
        values = _series(entries, name)
        # A stream that a mode does not train has loss 0 throughout.
        if not np.any(np.nan_to_num(values)):
            continue
        for begin, end in stages:
            # The noisy losses are of different scales: a line of its own for each.
            kind = entries[begin].get("noisy_loss") if name == "loss_noisy" else None
            text = f"{label} ({kind})" if kind else label
            color = _LOSS_COLORS[kind or label]
            axis.plot(steps[begin:end], values[begin:end], color=color, alpha=0.25, linewidth=0.8)
            mean = _running_mean(values[begin:end], max(1, len(entries) // 50))
            axis.plot(steps[begin:end], mean, color=color, label=None if text in labels else text)
            labels.add(text)
    axis.set(ylabel="loss")
    if labels:
        axis.legend(frameon=False)
    if len(stages) > 1:
        for begin, _ in stages:
            text = f"B = {entries[begin].get('block_size')}"
            axis.annotate(text, (steps[begin], 1), (3, -2), ("data", "axes fraction"), "offset points", va="top")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    ones = np.ones(min(window, len(values)))
    total = np.convolve(np.nan_to_num(values), ones, "same")
    count = np.convolve(np.isfinite(values), ones, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_acceptance(axis: "Axes", measured: list[dict[str, Any]]) -> None:
    """A line a depth, darker the nearer to the text."""
    depths = max(len(entry["acceptance"]) for entry in measured)
    for depth in range(depths):
        with_depth = [entry for entry in measured if len(entry["acceptance"]) > depth]
        axis.plot(
            [entry["step"] for entry in with_depth],
            [_nan(entry["acceptance"][depth]) for entry in with_depth],
            marker="o",
            markersize=3,
            color=shade(depth, depths),
            label=f"depth {depth + 1}",
        )
    axis.set(ylabel="held-out acceptance", ylim=(0, 1))
    axis.legend(frameon=False, ncols=min(depths, 4))
