"""Answers the questions of tasks by AR and by strided decoding, and keeps every answer with its score as a JSON line.

A cell is one task, mode and temperature. Its answers are a file ``samples/<cell>.jsonl``, what shaped them lies beside
it as ``samples/<cell>.json``. A batch is written whole, so a run that was killed goes on with the first batch missing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import batched
from pathlib import Path
from typing import Any

import jax

from idlm_jax.checkpoint.atomic import write_file
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import SamplingParams, check_request
from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.evaluation.tasks import gsm8k, humaneval, ifeval
from idlm_jax.evaluation.tasks.item import Item
from idlm_jax.model import Generation, LanguageModel

# Name -> its questions, from a file or, given None, those at hand; the second argument: for a chat model.
TASKS: dict[str, Callable[[Path | None, bool], list[Item]]] = {
    "gsm8k": gsm8k.read_items,
    "humaneval": humaneval.read_items,
    "ifeval": ifeval.read_items,
}
SAMPLES = "samples"


@dataclass(frozen=True)
class Mode:
    """A way to answer."""

    strided: bool
    # Whether an adapter acts on mask rows only; otherwise on every row, which makes it another model.
    gated: bool
    # The mode whose very texts it repeats, with an adapter.
    reference: str | None = None


MODES = {
    "ar": Mode(strided=False, gated=True),
    "r-isd": Mode(strided=True, gated=True, reference="ar"),
    "isd": Mode(strided=True, gated=False, reference="adapted-ar"),
    "adapted-ar": Mode(strided=False, gated=False),
}
# What may differ between the cells of a directory.
_OF_CELL = ("task", "mode", "temperature", "items", "prompts_sha256")


@dataclass(frozen=True)
class RunConfig:
    """What to run, and where the answers go."""

    output: Path
    # How the strided modes decode.
    decode: DecodeConfig
    modes: tuple[str, ...]
    temperatures: tuple[float, ...] = (0.0,)
    max_tokens: int = 512
    # Questions answered at once.
    batch_size: int = 32
    # Of the first question; each has its own.
    seed: int = 0

    def decode_of(self, mode: str) -> DecodeConfig:
        """How a mode decodes."""
        stride = self.decode.stride if MODES[mode].strided else 1
        return replace(self.decode, stride=stride, gated=MODES[mode].gated)

    def validate(self, model: LanguageModel) -> None:
        """Raise UserError for what cannot run with this model."""
        for mode in self.modes:
            if mode not in MODES:
                raise UserError(f"unknown mode '{mode}' (one of {', '.join(MODES)}){did_you_mean(mode, MODES)}")
            if mode in ("r-isd", "adapted-ar") and not model.has_adapter:
                raise UserError(f"the mode {mode} is one of an adapter; give one with --adapter")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}")
        if any(MODES[mode].strided for mode in self.modes) and self.decode.stride == 1:
            raise UserError("stride 1 is AR, and strided modes need a larger one; give --modes ar for AR alone")
        for temperature in self.temperatures:
            SamplingParams(temperature, seed=self.seed, max_tokens=self.max_tokens).validate()
        self.decode.policy()


def default_modes(has_adapter: bool) -> tuple[str, ...]:
    """AR, and the strided mode that repeats it."""
    return ("ar", "r-isd" if has_adapter else "isd")


def read_task(name: str, path: Path | None, chat: bool, limit: int | None = None) -> list[Item]:
    """The first ``limit`` questions of a task; raises UserError."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}' (one of {', '.join(TASKS)}){did_you_mean(name, TASKS)}")
    items = TASKS[name](path, chat)
    if len({item.id for item in items}) < len(items):
        raise UserError(f"{name}: two of its questions have the same id")
    return items[:limit]


def run_tasks(
    model: LanguageModel,
    tasks: Mapping[str, Sequence[Item]],
    config: RunConfig,
    about: Mapping[str, Any],
    on_batch: Callable[[str, int], None] = lambda cell, answered: None,
) -> None:
    """Answer all questions in every mode at every temperature; cells that are there already are not done again.

    ``about`` says for later what the model is (its name, and ``adapter``). ``on_batch`` hears of every batch, also of
    those that were there already, of which cell it is and how many questions it answered. Raises UserError before
    anything is decoded for what cannot run, and for a directory that holds answers of another model or of other
    settings.
    """
    config.validate(model)
    prompts = {name: [model.encode(model.as_chat(item.prompt)) for item in items] for name, items in tasks.items()}
    for name, items in tasks.items():
        _check_prompts(model, config, name, items, prompts[name])
    cells = list(_cells(model, tasks, config, about))
    (config.output / SAMPLES).mkdir(parents=True, exist_ok=True)
    for cell in cells:
        _check_directory(config.output, cell)
    for cell in cells:
        _run_cell(model, tasks[cell["task"]], prompts[cell["task"]], config, cell, on_batch)


def cell_name(cell: Mapping[str, Any]) -> str:
    """How its files are called."""
    return f"{cell['task']}_{cell['mode']}_t{cell['temperature']:g}"


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The answers of a cell, in the order they were given; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _cells(
    model: LanguageModel, tasks: Mapping[str, Sequence[Item]], config: RunConfig, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """What shapes the answers of each cell."""
    for task, items in tasks.items():
        hashes = "".join(_hash(item.prompt) for item in items)
        for temperature in config.temperatures:
            for mode in config.modes:
                yield {
                    "task": task,
                    "mode": mode,
                    "temperature": temperature,
                    "items": len(items),
                    "prompts_sha256": _hash(hashes),
                    **about,
                    "dtype": str(model.model.dtype),
                    "device": _device(model),
                    "stride": config.decode.stride,
                    "layout": config.decode.layout,
                    "coupling": config.decode.coupling,
                    "kernels": config.decode.kernels,
                    "max_tokens": config.max_tokens,
                    "batch_size": config.batch_size,
                    "seed": config.seed,
                }


def _device(model: LanguageModel) -> str:
    mesh, kind = model.model.mesh, jax.devices()[0].device_kind
    return kind if mesh is None else f"{kind}, tp {mesh.shape['tp']}, data_parallel {model.copies}"


def _check_prompts(
    model: LanguageModel, config: RunConfig, task: str, items: Sequence[Item], prompts: Sequence[list[int]]
) -> None:
    sampling = SamplingParams(max_tokens=config.max_tokens)
    policies = [config.decode_of(mode).policy() for mode in config.modes]
    for item, prompt in zip(items, prompts, strict=True):
        try:
            for policy in policies:
                check_request(model.model, prompt, sampling, policy)
        except UserError as error:
            raise UserError(f"{task}, question {item.id}: {error}") from None


def _check_directory(output: Path, cell: Mapping[str, Any]) -> None:
    """Raise UserError if a cell there has other settings than one to come."""
    for path in sorted((output / SAMPLES).glob("*.json")):
        there = json.loads(path.read_text(encoding="utf-8"))
        same_cell = path.stem == cell_name(cell)
        for key in cell:
            if (same_cell or key not in _OF_CELL) and there.get(key) != cell[key]:
                raise UserError(
                    f"{output} holds answers with {key} {there.get(key)} ({path.stem}), not {cell[key]}; give another "
                    "--output"
                )


def _run_cell(
    model: LanguageModel,
    items: Sequence[Item],
    prompts: Sequence[list[int]],
    config: RunConfig,
    cell: Mapping[str, Any],
    on_batch: Callable[[str, int], None],
) -> None:
    """Answer the questions of a cell that no complete batch has answered yet."""
    name, decode = cell_name(cell), config.decode_of(cell["mode"])
    path = config.output / SAMPLES / f"{name}.jsonl"
    write_file(path.with_suffix(".json"), json.dumps(cell, indent=2) + "\n")
    # The longest first: what does not fit in memory fails at once, and a batch holds prompts of about one length.
    order = sorted(range(len(items)), key=lambda i: -len(prompts[i]))
    # All of about one size: each is a program to compile.
    count = -(-len(order) // config.batch_size)
    batches = list(batched(order, -(-len(order) // count)))
    lines = read_samples(path)
    answered = {line["id"] for line in lines}
    done = {number for number, batch in enumerate(batches) if all(items[i].id in answered for i in batch)}
    kept = [line for line in lines if line["batch"] in done]
    write_file(path, "".join(_json_line(line) for line in kept))
    on_batch(name, len(kept))
    with path.open("ab", buffering=0) as file, ThreadPoolExecutor(os.cpu_count()) as scorers:
        for number, batch in enumerate(batches):
            if number in done:
                continue
            sampling = [
                SamplingParams(
                    cell["temperature"], seed=config.seed + i, max_tokens=config.max_tokens, stop=items[i].stop
                )
                for i in batch
            ]
            answers = model.generate([prompts[i] for i in batch], sampling, decode)
            scores = list(scorers.map(lambda i, answer: items[i].score(answer.text), batch, answers))
            samples = [
                _sample(items[i], answer, score, number)
                for i, answer, score in zip(batch, answers, scores, strict=True)
            ]
            file.write("".join(map(_json_line, samples)).encode())
            on_batch(name, len(batch))


def _sample(item: Item, answer: Generation, scores: dict[str, bool], batch: int) -> dict[str, Any]:
    return {
        "id": item.id,
        "prompt_sha256": _hash(item.prompt),
        "text": answer.text,
        "token_ids": answer.token_ids,
        "scores": scores,
        "finish_reason": answer.finish_reason,
        "seed": answer.sampling.seed,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.stats.tokens,
        "forwards": answer.stats.forwards,
        "tokens_per_forward": answer.stats.tokens_per_forward,
        # The answers of a batch are decoded together, in the same seconds.
        "batch": batch,
        "batch_seconds": answer.seconds,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
