"""``idlm data inspect``: the packed rows of a token store as text, coloured by what training does with them."""

import itertools
import json as jsonlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Bool, Int
from rich.markup import escape
from rich.text import Text
from tyro.conf import Positional, arg

from idlm_jax.cli.flags import Model
from idlm_jax.cli.render import Notice, make_console, printable
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from idlm_jax.data.tokens import TokenStore

PROMPT = "dim"
# Neighbouring groups differ.
GROUPS = ("bold cyan", "bold magenta")


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a document that training treats alike."""

    text: str
    target: bool  # they are learnt
    group: int | None  # the mask group that hides them, numbered from 0 in their row; the last one if several do


def data_inspect(
    store: Annotated[Positional[Path], arg(metavar="STORE")],
    *,
    model: Model,
    rows: Annotated[int, arg(metavar="COUNT")] = 1,
    length: Annotated[
        int | None, arg(metavar="COUNT", help_behavior_hint="(default: that of the longest document)")
    ] = None,
    block_size: Annotated[int, arg(metavar="B")] = 3,
    starts: Literal["random", "aligned"] = "random",
    seed: Annotated[int, arg(metavar="SEED")] = 0,
    json: bool = False,
) -> None:
    """Show rows of a token store as training sees them: documents, loss mask and mask groups.

    Prompts are dim, learnt tokens normal, and what the mask groups of one training step hide is coloured, neighbouring
    groups differently. Each hidden token stands where a mask stands; the mask predicts the token after it.

    Examples:
      idlm data inspect data/chats --model Qwen/Qwen3-0.6B
      idlm data inspect data/free --model models/smollm2 --rows 2 --length 512 --block-size 7 --starts aligned

    Args:
        store: Token store of `idlm data prepare` or `synthesize`.
        model: The model whose tokenizer made the store: directory, .gguf file, or Hub id.
        rows: Rows to show.
        length: Tokens of a row.
        block_size: Mask rows of a group.
        starts: Where groups begin: drawn at random, or at multiples of the block size.
        seed: Another seed, other rows and other random groups.
        json: Print one JSON object a row, a line each.
    """
    from idlm_jax.checkpoint.open import open_source
    from idlm_jax.data.tokens import TokenStore, check_tokenizer

    if rows < 1 or block_size < 1:
        raise UserError("--rows and --block-size must be at least 1")
    opened = TokenStore.open(store)
    with Notice(f"loading the tokenizer of {model}"):
        tokenizer = open_source(model).tokenizer()
    check_tokenizer(opened.metadata, tokenizer, store)
    length = int(opened.lengths().max()) if length is None else length
    with Notice("packing rows"):
        batch, group_BL, groups_B = _first_batch(opened, rows, length, block_size, starts, seed)
    console = make_console()
    if not json:
        counts = opened.metadata["counts"]
        console.print(
            f"[bold]{escape(str(store))}[/]: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['target_tokens']:,} of them targets"
        )
    for row in range(rows):
        segments = batch["segment_ids"][row]
        if not segments.any():
            print(f"{store} fills no more than {row} rows of {length} tokens", file=sys.stderr)
            break
        documents = []
        for segment in range(1, segments.max() + 1):
            chosen = segments == segment
            parts = (array[row, chosen] for array in (batch["tokens"], batch["loss_mask"], group_BL))
            documents.append(list(_spans(tokenizer, *parts)))
        if json:
            spans = [[asdict(span) for span in document] for document in documents]
            head = {"tokens": int((segments > 0).sum()), "groups": int(groups_B[row])}
            print(jsonlib.dumps({**head, "documents": spans}, ensure_ascii=False))
        else:
            console.rule(
                f"row {row + 1}: {(segments > 0).sum()} of {length} tokens, documents: {len(documents)}, "
                f"mask groups: {groups_B[row]}",
                align="left",
            )
            _print_documents(console, documents, segments)


def _first_batch(
    store: "TokenStore", rows: int, length: int, block_size: int, starts: str, seed: int
) -> tuple[dict[str, np.ndarray], Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """The first rows of training, the mask group that hides each of their tokens (-1: none), and how many there are."""
    import jax

    from idlm_jax.data.pipeline import make_dataset
    from idlm_jax.training.groups import Batch, GroupPolicy, draw_groups

    iterator = iter(make_dataset(store, length=length, batch_size=rows, seed=seed, epochs=1))
    batch = next(iterator)
    iterator.close()
    # Which token masks are made of is of no interest here.
    noisy = draw_groups(
        Batch.from_dict(jax.tree.map(jax.numpy.asarray, batch)),
        GroupPolicy(block_size, starts),
        0,
        jax.random.key(seed),
    )
    group_BL = np.full((rows, length), -1)
    row, place = np.nonzero(noisy.is_target)
    group_BL[row, np.asarray(noisy.clean_row)[row, place]] = place // block_size
    groups_B = np.array([len(np.unique(place[row == r] // block_size)) for r in range(rows)])
    return batch, group_BL, groups_B


def _spans(
    tokenizer: "PreTrainedTokenizerBase",
    tokens_L: Int[np.ndarray, " L"],
    mask_L: Bool[np.ndarray, " L"],
    group_L: Int[np.ndarray, " L"],
) -> Iterator[Span]:
    """A document, cut wherever loss mask or group change."""
    kinds = zip(mask_L.tolist(), group_L.tolist(), strict=True)
    tokens = iter(tokens_L.tolist())
    for (target, group), run in itertools.groupby(kinds):
        text = str(tokenizer.decode([next(tokens) for _ in run]))
        yield Span(text, target, None if group < 0 else group)


def _print_documents(console: "Console", documents: list[list[Span]], segments: Int[np.ndarray, " L"]) -> None:
    for number, document in enumerate(documents, 1):
        console.print(f"[bold]document {number}[/], {(segments == number).sum()} tokens")
        text = Text()
        for span in document:
            style = PROMPT if not span.target else "" if span.group is None else GROUPS[span.group % len(GROUPS)]
            text.append(printable(span.text), style)
        console.print(text, soft_wrap=True)
