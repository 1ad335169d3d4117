"""Why greedy answers of `idlm eval tasks` differ from AR's: the logits where they first do.

    python scripts/trace_texts.py runs/tasks/full_float32 --tasks gsm8k=test.jsonl humaneval ifeval

Each strided greedy answer is compared with AR's, token by token. Where two differ, the model reads the question and
what both have written before, in float32 by one causal pass, and the gap is between the logits of AR's token and of the
other's. Two tokens that are the two best there and almost as good, next to the rounding errors of the answers' dtype,
are a tie, which the order of sums decides. Anything else would be an error of decoding. Runs on any device.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import idlm_jax
from idlm_jax.backbone.qwen3 import causal_logits
from idlm_jax.errors import UserError
from idlm_jax.evaluation.equivalence import first_difference
from idlm_jax.evaluation.reports import Grid, markdown
from idlm_jax.evaluation.tasks.run import MODES, SAMPLES, cell_name, read_samples, read_task
from idlm_jax.evaluation.tasks.summary import reference_of

# Texts are read in lengths that are multiples of it: each is a program to compile.
_LENGTHS = 256


@dataclass(frozen=True)
class Options:
    """What to trace."""

    # Directory of `idlm eval tasks`.
    output: tyro.conf.Positional[Path]
    # NAME or NAME=FILE, as they were given there.
    tasks: tuple[str, ...]
    # Another place of the model than the one that the answers name.
    model: str | None = None


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves AR's."""

    id: str
    # Number of the first token that differs.
    token: int
    # Logit of AR's token minus that of the other's.
    gap: float
    # Whether these two have the two largest logits.
    best_two: bool
    # Standard deviation of all logits there.
    spread: float


def trace(
    model: idlm_jax.LanguageModel, prompt: list[int], ar: dict[str, Any], other: dict[str, Any], gated: bool
) -> Difference | None:
    """The first token that differs, None if there is none."""
    at = first_difference(ar["token_ids"], other["token_ids"])
    if at is None:
        return None
    if at == min(len(ar["token_ids"]), len(other["token_ids"])):
        raise UserError(f"question {ar['id']}: one answer is the beginning of the other; was it interrupted?")
    context = prompt + ar["token_ids"][:at]
    padded = np.zeros((1, math.ceil(len(context) / _LENGTHS) * _LENGTHS), np.int32)
    padded[0, : len(context)] = context
    logits = np.array(_logits_at(model.model, padded, len(context) - 1, gated))
    if model.config.mask_token_id is not None:
        logits[model.config.mask_token_id] = -np.inf
    pair = [ar["token_ids"][at], other["token_ids"][at]]
    best_two = set(pair) == set(np.argsort(logits)[-2:].tolist())
    finite = logits[np.isfinite(logits)]
    return Difference(ar["id"], at, float(logits[pair[0]] - logits[pair[1]]), best_two, float(finite.std()))


@jax.jit(static_argnames="gated")
def _logits_at(model: Any, tokens: jax.Array, row: int, gated: bool) -> jax.Array:
    """Logits of one row of a causal pass; a row sees nothing of the padding after it."""
    return causal_logits(model, tokens, None if gated else 0)[0, row]


def cells(output: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]]:
    """Every greedy cell with a reference: its settings, the reference's answers and its own, question by question."""
    for path in sorted((output / SAMPLES).glob("*.json")):
        cell = json.loads(path.read_text())
        reference = reference_of(cell)
        if cell["temperature"] or reference is None:
            continue
        theirs = {
            line["id"]: line
            for line in read_samples(output / SAMPLES / f"{cell_name({**cell, 'mode': reference})}.jsonl")
        }
        ours = [line for line in read_samples(path.with_suffix(".jsonl")) if line["id"] in theirs]
        yield cell, [theirs[line["id"]] for line in ours], ours


def main(options: Options) -> None:
    """Print a table of the cells, and a line for each difference in float32."""
    files = dict(task.partition("=")[::2] for task in options.tasks)
    model, rows = None, []
    for cell, theirs, ours in cells(options.output):
        if cell["task"] not in files:
            continue
        if model is None:
            model = idlm_jax.load(options.model or cell["model"], cell["adapter"], "float32")
        file = files[cell["task"]]
        items = read_task(cell["task"], Path(file) if file else None, bool(model.tokenizer.chat_template))
        prompts = {item.id: model.encode(model.as_chat(item.prompt)) for item in items}
        gated = MODES[cell["mode"]].gated or not cell["adapter"]
        found = [trace(model, prompts[ar["id"]], ar, other, gated) for ar, other in zip(theirs, ours, strict=True)]
        different = [each for each in found if each is not None]
        gaps = np.array([abs(each.gap) / each.spread for each in different])
        rows.append(
            (
                f"{cell['task']}, {cell['mode']}",
                cell["dtype"],
                f"{len(found) - len(different)}/{len(found)}",
                *(f"{np.quantile(gaps, share):.1e}" if len(gaps) else "-" for share in (0.5, 0.99, 1.0)),
                f"{sum(each.best_two for each in different)}/{len(different)}",
            )
        )
        if cell["dtype"] == "float32":
            for each in different:
                print(f"{cell_name(cell)}: {each}", file=sys.stderr, flush=True)
    if not rows:
        raise UserError(f"{options.output} holds no greedy answers to {', '.join(files)} with those they should equal")
    header = ("cell", "answers in", "same tokens", "median gap", "99 %", "largest", "the two best tokens")
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    title = f"gaps in units of the standard deviation of all logits there, {device}"
    print(markdown([Grid(title, header, tuple(rows))]))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
