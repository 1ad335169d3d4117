"""The picture of the report: errors by position and by layer, and what the tests of texts found, writer by writer."""

from typing import TYPE_CHECKING, Any

import numpy as np

from idlm_jax.plots import GREY, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRONG = "official rule"
FLOOR = 1e-12


def draw_picture(results: dict[str, Any]) -> "Figure":
    """Four panels, of those whose numbers there are."""
    figure = new_figure(12, 8.5)
    axes = figure.subplots(2, 2)
    if results.get("logits"):
        _errors(axes[0, 0], results["logits"], "position")
        _errors(axes[0, 1], results["logits"], "layer")
    if results.get("draws"):
        _p_values(axes[1, 0], results["draws"]["writers"])
    if results.get("texts"):
        _distances(axes[1, 1], results["texts"]["writers"])
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
        tidy(axis)
    return figure


def _errors(axis: "Axes", logits: dict[str, Any], by: str) -> None:
    """Mean error of ours and of PyTorch's bfloat16, against PyTorch's float32."""
    for number, (name, model) in enumerate(logits.items()):
        for dtype, against, style in (
            ("float32", "float32", "-"),
            ("bfloat16", "float32", "--"),
            ("bfloat16", "PyTorch itself", ":"),
        ):
            found = model[dtype]["layers"] if by == "layer" else model[dtype]["rows"]["decoding window, clean rows"]
            if by == "position" and against == "PyTorch itself":
                found = model[dtype]["rows"]["clean pass"]
            values = found[against] if by == "layer" else found[against]["by_position"]
            writer = "PyTorch" if against == "PyTorch itself" else "ours"
            label = f"{'SmolLM2' if name == 'real' else name}, {writer} {dtype}" if by == "position" else None
            axis.plot(np.arange(1, len(values) + 1), values, style, color=f"C{number}", linewidth=1.2, label=label)
    ylabel = "mean error of logits / their spread" if by == "position" else "error of a layer's output / its size"
    axis.set(yscale="log", xlabel=by, ylabel=ylabel, title=f"against PyTorch float32, by {by}")
    if by == "position":
        axis.legend(fontsize=6, ncols=3, loc="center", bbox_to_anchor=(0.5, 0.6), columnspacing=1)


def _p_values(axis: "Axes", writers: dict[str, Any]) -> None:
    """p-values of all prefixes and depths in order: on the diagonal where nothing differs."""
    for number, (name, row) in enumerate(writers.items()):
        # Where all texts of a prefix are equal there is nothing to test.
        p = np.concatenate([view["total_variation_p"] for view in row["views"].values()])
        p = np.sort(np.maximum(p[p < 1], FLOOR))
        uniform = (np.arange(len(p)) + 0.5) / len(p)
        wrong = name == WRONG
        axis.plot(uniform, p, color="black" if wrong else f"C{number}", linewidth=2 if wrong else 1.2, label=name)
    axis.plot([1e-3, 1], [1e-3, 1], color=GREY, linewidth=0.8, linestyle="--")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="expected p-value if nothing differs",
        ylabel="p-value (total variation)",
        title="draws: every prefix, depth and text",
    )
    axis.legend(fontsize=7)


def _distances(axis: "Axes", writers: dict[str, Any]) -> None:
    """Every test of long texts in standard deviations above its null."""
    for number, (name, row) in enumerate(writers.items()):
        tests = row["distances"]
        excess = [test["excess"] for test in tests.values()]
        marker, color = ("X", "black") if name == WRONG else ("o", f"C{number}")
        axis.scatter(np.arange(len(tests)) + 0.06 * (number - 3), excess, marker=marker, color=color, s=22, label=name)
    axis.axhspan(-2, 2, color=GREY, alpha=0.15)
    axis.set_xticks(range(len(tests)), list(tests), rotation=20)
    axis.set_yscale("symlog", linthresh=3)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(ylabel="standard deviations above the null", title="long texts: distances from PyTorch's")
    axis.legend(fontsize=7)
