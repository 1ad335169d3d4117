"""From what both sides wrote to numbers: every test of the report, as plain values ready for JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from idlm_jax.evaluation.equivalence import first_difference
from idlm_jax.evaluation.two_samples import DrawComparison, Outcome, compare_draws, compare_texts, holm
from scripts.equivalence.plan import DTYPES, Plan

# A writer fails if any of its tests, corrected by Holm, has a p-value below this.
ALPHA = 0.01


def analyse(folder: Path, plan: Plan) -> dict[str, Any]:
    """Everything the report says."""
    ours, theirs = (json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "theirs"))
    results: dict[str, Any] = {
        "plan": {name: value for name, value in asdict(plan).items() if name not in ("prompts", "shapes")},
        "alpha": ALPHA,
        "run": {
            "parts": plan.parts,
            "versions": theirs["versions"] | ours["versions"],
            "seconds": {"PyTorch": theirs["seconds"], "idlm_jax": ours["seconds"]},
        },
    }
    if "logits" in plan.parts:
        results["logits"] = ours["logits"]
    if "draws" in plan.parts:
        results["draws"] = analyse_draws(folder)
    if "texts" in plan.parts:
        results["texts"] = analyse_texts(folder)
    if "greedy" in plan.parts:
        results["greedy"] = {dtype: analyse_greedy(folder, dtype) for dtype in DTYPES}
    return results


def analyse_draws(folder: Path) -> dict[str, Any]:
    """Short texts of every writer against PyTorch's, and how many drafts were accepted against PyTorch's ISD."""
    theirs, ours = np.load(folder / "draws-theirs.npz"), np.load(folder / "draws-ours.npz")
    names = [name for name in ours if "/" not in name]
    writers = {"PyTorch AR again": theirs["control"], "PyTorch ISD": theirs["isd"]} | {
        name: ours[name] for name in names
    }
    reference, rng = theirs["reference"], np.random.default_rng(0)
    accepted = {
        name: _of_draws(compare_draws(ours[f"{name}/accepted"][..., None], theirs["isd_accepted"][..., None], rng))
        | {"mean": float(ours[f"{name}/accepted"].mean())}
        for name in names
        if "ratio" in name or "official" in name
    }
    return {
        "prefixes": len(reference),
        "reference_texts": int(reference.shape[1]),
        "tokens": int(reference.shape[2]),
        "writers": {
            name: _of_draws(compare_draws(texts, reference, rng)) | {"texts": int(texts.shape[1])}
            for name, texts in writers.items()
        },
        "accepted": {"PyTorch ISD": {"mean": float(theirs["isd_accepted"].mean())}} | accepted,
        "same_as_our_ar": {
            name: float(np.all(ours[name] == ours["AR"], axis=-1).mean()) for name in names if "gumbel" in name
        },
    }


def _of_draws(comparisons: list[DrawComparison]) -> dict[str, Any]:
    adjusted = holm([outcome.p for each in comparisons for outcome in each.outcomes])
    views = {
        each.view: {
            "chi_square": _of(each.all_chi_square),
            "total_variation": _of(each.all_total_variation),
            "chi_square_p": [float(f"{outcome.p:.3g}") for outcome in each.chi_square],
            "total_variation_p": [float(f"{outcome.p:.3g}") for outcome in each.total_variation],
        }
        for each in comparisons
    }
    return {"views": views} | _verdict(adjusted)


def analyse_texts(folder: Path) -> dict[str, Any]:
    """Long texts of every writer against PyTorch's."""
    texts, rng = np.load(folder / "texts-ours.npz"), np.random.default_rng(1)
    scores, reference = np.load(folder / "surprisal.npz"), "PyTorch/reference"
    writers = {"PyTorch AR again" if name == "PyTorch/control" else name: name for name in texts if name != reference}
    results = {}
    for shown, name in sorted(writers.items(), key=lambda item: item[1] != "PyTorch/control"):
        surprisal = scores[name], scores[reference]
        outcomes = compare_texts(texts[name], texts[reference], surprisal, rng)
        tests = {test: _of(outcome) for test, outcome in outcomes.items()}
        results[shown] = {"distances": tests} | _verdict(holm([outcome.p for outcome in outcomes.values()]))
        results[shown]["means"] = {
            "tokens": float(np.sum(texts[name] >= 0, axis=-1).mean()),
            "surprisal": float(surprisal[0].mean()),
        }
    prefixes, count, length = texts[reference].shape
    return {"prefixes": prefixes, "texts": prefixes * count, "tokens": length, "writers": results}


def analyse_greedy(folder: Path, dtype: str) -> dict[str, Any]:
    """Greedy texts of every way against PyTorch's and against our AR's."""
    theirs, ours = np.load(folder / f"greedy-{dtype}.npz"), np.load(folder / f"greedy-ours-{dtype}.npz")
    ways = {}
    for name in (name for name in ours if "/" not in name):
        differences = []
        for i, (text, reference) in enumerate(zip(ours[name], theirs["texts"], strict=True)):
            at = first_difference(text.tolist(), reference.tolist())
            if at is not None:
                differences.append({"prompt": i, "token": at, "gap": float(theirs["gaps"][i, at])})
        ways[name] = {
            "same_as_pytorch": len(theirs["texts"]) - len(differences),
            "differences": differences,
            "same_as_our_ar": int(np.all(ours[name] == ours["AR"], axis=1).sum()),
            "tokens_per_forward": float(ours[name].size / ours[f"{name}/rounds"].sum()),
        }
    return {"texts": len(theirs["texts"]), "tokens": int(theirs["texts"].shape[1]), "ways": ways}


def _verdict(adjusted: np.ndarray) -> dict[str, Any]:
    return {
        "tests": len(adjusted),
        "rejected": int(np.sum(adjusted < ALPHA)),
        "smallest_p": float(adjusted.min()),
    }


def _of(outcome: Outcome) -> dict[str, float]:
    return asdict(outcome) | {"excess": outcome.excess}
