"""``idlm data prepare``: chats and text, tokenised, as a token store."""

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from tyro.conf import Positional, arg

from idlm_jax.cli.flags import Model
from idlm_jax.cli.progress import Progress
from idlm_jax.cli.render import Notice, make_console

if TYPE_CHECKING:
    from idlm_jax.data.tokens import TokenStore


def data_prepare(
    sources: Annotated[Positional[tuple[Path, ...]], arg(metavar="SOURCE [SOURCE …]", help_behavior_hint="(required)")],
    *,
    model: Model,
    output: Annotated[Path, arg(metavar="DIR")],
    max_length: Annotated[int, arg(metavar="COUNT")] = 2048,
    skip_bad: bool = False,
    workers: Annotated[
        int | None, arg(metavar="COUNT", help_behavior_hint="(default: the number of processors)")
    ] = None,
    json: bool = False,
) -> None:
    """Turn chats and text into a token store, with a loss mask on what the assistant says.

    A .jsonl file holds a document a line: {"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]},
    {"prompt", "response" or "completion"}, or {"text"}. A .txt file is one document. Chats are written by the model's
    own template and cut at the maximal length; plain text is split into pieces of it, and all of it is learnt. A run
    that was interrupted goes on when the command is repeated.

    Examples:
      idlm data prepare chats.jsonl --model Qwen/Qwen3-0.6B --output data/chats
      idlm data prepare books/*.txt extra.jsonl --model models/smollm2 --output data/mix --max-length 1024 --skip-bad

    Args:
        sources: Files of chats and text, .jsonl and .txt.
        model: The model to train, for its tokenizer and chat template: directory, .gguf file, or Hub id.
        output: Token store to create.
        max_length: Most tokens of a document; the length of the rows that training packs can be larger.
        skip_bad: Leave out lines that are no document, and count them, instead of stopping at the first.
        workers: Processes that tokenise; the result does not depend on it.
        json: Print what store.json holds.
    """
    from idlm_jax.checkpoint.open import open_source
    from idlm_jax.data.prepare import prepare, read_sources
    from idlm_jax.data.tokens import partial_path

    with Notice("hashing the sources"):
        files = read_sources(sources)
    with Notice(f"loading the tokenizer of {model}"):
        tokenizer = open_source(model).tokenizer()
    if partial_path(output).is_dir():
        print(f"going on with {partial_path(output)}", file=sys.stderr)
    with Progress("preparing", sum(file.size for file in files)) as progress:
        store = prepare(
            files, tokenizer, output, max_length=max_length, skip_bad=skip_bad, workers=workers, progress=progress
        )
    if json:
        print(jsonlib.dumps({"path": str(output), **store.metadata}, ensure_ascii=False))
    else:
        print(f"wrote {output}")
        make_console().print(_table(store))


def _table(store: "TokenStore") -> Table:
    counts = store.metadata["counts"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, count in {
        "documents": counts["documents"],
        "tokens": counts["tokens"],
        "of these targets": counts["target_tokens"],
        "tokens of the longest document": int(store.lengths().max()),
        "documents cut": counts["cut_documents"],
        "documents dropped, without a target": counts["dropped_documents"],
        "bad lines skipped": counts["bad_lines"],
    }.items():
        table.add_row(label, f"{count:,}")
    return table
