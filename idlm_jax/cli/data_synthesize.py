"""``idlm data synthesize``: training text from the model itself, as a token store."""

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tqdm import tqdm
from tyro.conf import Positional, arg

from idlm_jax.cli.flags import BatchModelFlags, Model, check_can_draft
from idlm_jax.cli.render import Notice, make_console
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from idlm_jax.data.synthesize import Progress, SynthesisConfig
    from idlm_jax.data.tokens import TokenStore

# A flag without a value of its own: what stands for its default in the help.
_NONE = "(default: none)"


def data_synthesize(
    model: Positional[Model],
    *,
    output: Annotated[Path, arg(metavar="DIR")],
    prompts: Annotated[Path | None, arg(metavar="FILE.jsonl", help_behavior_hint=_NONE)] = None,
    tokens: Annotated[float | None, arg(metavar="COUNT", help_behavior_hint=_NONE)] = None,
    documents: Annotated[int | None, arg(metavar="COUNT", help_behavior_hint=_NONE)] = None,
    samples_per_prompt: Annotated[int, arg(metavar="COUNT")] = 1,
    temperature: Annotated[float, arg(metavar="T")] = 1.0,
    top_k: Annotated[int, arg(metavar="K")] = 0,
    top_p: Annotated[float, arg(metavar="P")] = 1.0,
    max_tokens: Annotated[int, arg(metavar="COUNT")] = 1024,
    batch_size: Annotated[int, arg(metavar="COUNT")] = 256,
    seed: Annotated[int, arg(metavar="SEED")] = 0,
    loss: Literal["assistant", "sampled"] = "assistant",
    stride: Annotated[int, arg(metavar="N")] = 1,
    resume: bool = False,
    json: bool = False,
    model_flags: Annotated[BatchModelFlags, arg(name="")],
) -> None:
    """Sample training text from a model itself.

    With --prompts the model answers them. Without, it writes the questions too, from the bare opening of its chat
    template, until there are --tokens or --documents. Which documents come out depends on the model, the prompts, the
    seed and the sampling parameters alone.

    Examples:
      idlm data synthesize models/smollm2 --output data/free --tokens 30e6 --batch-size 2048 --dtype bfloat16
      idlm data synthesize Qwen/Qwen3-0.6B --output data/answers --prompts questions.jsonl --samples-per-prompt 4
      idlm data synthesize models/smollm2 --output data/free --tokens 30e6 --resume

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name).
        output: Token store to create.
        prompts: Chats to answer, one a line, as in `idlm data prepare`; the last user message is the question.
        tokens: Stop when the model has written so many tokens in documents that are kept.
        documents: Stop after so many documents.
        samples_per_prompt: Answers to each prompt.
        temperature: Of the samples; 0 is greedy.
        top_k: Sample from the K most likely tokens; 0 is off.
        top_p: Sample from the most likely tokens that hold this probability.
        max_tokens: Longest document, template and prompt included; longer ones are cut.
        batch_size: Documents written at once; as many as memory holds.
        seed: Another seed, other documents.
        loss: What training learns from: the assistant's tokens, or all that the model sampled.
        stride: N, the most tokens a forward pass can emit; more than 1 pays off with an adapter and small batches.
        resume: Go on with an interrupted run of the same command.
        json: Print the counts as JSON.
    """
    if tokens is not None and tokens != int(tokens):
        raise UserError(f"--tokens must be a whole number, not {tokens}")
    from idlm_jax.data.chat import read_prompts
    from idlm_jax.data.synthesize import SynthesisConfig, synthesize
    from idlm_jax.decoding.config import DecodeConfig

    config = SynthesisConfig(
        documents=documents,
        tokens=None if tokens is None else int(tokens),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        loss=loss,
        samples_per_prompt=samples_per_prompt,
        stride=stride,
    )
    config.validate(prompts is not None)
    chats = None if prompts is None else read_prompts(prompts)
    loaded = model_flags.load(model)
    check_can_draft(model, loaded, DecodeConfig(stride=stride))
    name = Path(model).name if Path(model).exists() else model
    available = None if chats is None else len(chats) * samples_per_prompt
    try:
        with _Display(config, available) as display:
            store = synthesize(loaded, output, config, chats, name=name, resume=resume, on_progress=display)
    except KeyboardInterrupt:
        print("what was finished is kept; the same command with --resume goes on", file=sys.stderr)
        raise
    if config.tokens is not None and store.metadata["counts"]["sampled_tokens"] < config.tokens:
        print(f"every prompt is answered: that makes fewer than {config.tokens} tokens", file=sys.stderr)
    if json:
        print(jsonlib.dumps({"path": str(output), "counts": store.metadata["counts"], **store.metadata["speed"]}))
    else:
        make_console().print(_table(output, store))


class _Display:
    """How far a synthesis is: a bar on a terminal, a plain line every tenth of the way anywhere else."""

    def __init__(self, config: "SynthesisConfig", available: int | None):
        self._by_tokens = config.tokens is not None
        goals = [config.tokens] if self._by_tokens else [config.documents, available]
        self._goal = min(goal for goal in goals if goal is not None)
        self._unit = "tokens" if self._by_tokens else "documents"
        self._tenths = 0
        self._compiling = Notice("compiling")

    def __enter__(self) -> "_Display":
        self._compiling.__enter__()
        self._bar = tqdm(
            total=self._goal,
            desc="sampling",
            unit=f" {self._unit}",
            unit_scale=self._by_tokens,
            delay=2.0,
            disable=not sys.stderr.isatty(),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._compiling.__exit__()
        self._bar.close()

    def __call__(self, progress: "Progress") -> None:
        """Show how far it is."""
        self._compiling.__exit__()
        counts = progress.counts
        done = min(counts.sampled_tokens if self._by_tokens else counts.documents, self._goal)
        speed = progress.tokens / progress.seconds
        mean = counts.sampled_tokens / max(counts.documents, 1)
        self._bar.set_postfix_str(
            f"{counts.documents} documents of {mean:.0f} tokens, {speed:.0f} tokens/s", refresh=False
        )
        self._bar.update(done - self._bar.n)
        tenths = 10 * done // self._goal
        if self._bar.disable and tenths > self._tenths and progress.seconds > 2:
            self._tenths = tenths
            print(
                f"sampling: {10 * tenths}% of {self._goal} {self._unit}; {counts.documents} documents of {mean:.0f} "
                f"tokens, {speed:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )


def _table(output: Path, store: "TokenStore") -> Table:
    counts, speed = store.metadata["counts"], store.metadata["speed"]
    table = Table("", str(output), box=SIMPLE_HEAD, pad_edge=False)
    rows = {
        "documents": f"{counts['documents']:,}",
        "tokens": f"{counts['tokens']:,}",
        "of these sampled": f"{counts['sampled_tokens']:,}",
        "of these targets": f"{counts['target_tokens']:,}",
        "sampled tokens a document": f"{counts['sampled_tokens'] / counts['documents']:.0f}",
        "documents cut": f"{counts['cut_documents']:,}",
        "documents dropped": f"{counts['dropped_documents']:,}",
        "sampled tokens a second": f"{speed['tokens_per_second']:,.0f}",
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table
