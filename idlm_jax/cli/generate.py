"""``idlm generate``: answer prompts, or compare strided decoding with AR decoding on them."""

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from idlm_jax.cli.flags import BatchModelFlags, DecodeFlags, Model, SamplingFlags, check_adapter, check_can_draft
from idlm_jax.cli.render import Notice, make_console, printable, show_comparison, show_piece, statistics
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.decoding.generate import SamplingParams
    from idlm_jax.evaluation.equivalence import Comparison
    from idlm_jax.model import LanguageModel, Prompt

ROLES = ("system", "user", "assistant", "tool")


def generate(
    model: Positional[Model],
    *,
    prompt: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = (),
    messages: Annotated[Path | None, arg(metavar="FILE.json")] = None,
    system: Annotated[str | None, arg(metavar="TEXT")] = None,
    raw: bool = False,
    compare: bool = False,
    json: bool = False,
    model_flags: Annotated[BatchModelFlags, arg(name="")],
    decode_flags: Annotated[DecodeFlags, arg(name="")],
    sampling_flags: Annotated[SamplingFlags, arg(name="")],
) -> None:
    """Answer one or more prompts, several tokens a forward pass.

    The prompt is an argument, a chat in a JSON file, or text on standard input. One answer is printed as it comes;
    statistics go to standard error. Several prompts are decoded as one batch.

    Examples:
      idlm generate checkpoints/i-dlm-8b --prompt "Why is the sky blue?"
      idlm generate Qwen/Qwen3-0.6B --stride 1 --prompt "Once upon a time" --raw --temperature 0.8 --seed 7
      idlm generate models/smollm2 --prompt "Why is the sky blue?" --compare --dtype float32
      idlm generate models/smollm2 --messages chat.json --decode configs/decode/isd_n4.yaml --json
      cat question.txt | idlm generate models/smollm2

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name).
        prompt: What to answer; repeat it to answer several as one batch.
        messages: A chat to answer: a JSON list of {"role": …, "content": …}.
        system: System message before the prompts.
        raw: Continue the text as it stands, without the model's chat template.
        compare: Decode by AR too; print both texts if they differ, and the statistics of both.
        json: Print one JSON object a prompt, a line each.
    """
    prompts = _read_prompts(prompt, messages, system, raw)
    decode = decode_flags.config()
    sampling = sampling_flags.params(decode)
    loaded = model_flags.load(model)
    check_adapter(loaded, decode_flags)
    check_can_draft(model, loaded, decode)
    ready = [loaded.as_chat(p, system) if isinstance(p, str) and not raw else p for p in prompts]
    if decode_flags.ungated:
        print("the adapter acts on every row: this is the adapted model's text, not the base model's", file=sys.stderr)
    if compare:
        _compare(loaded, ready, sampling, decode, json)
    elif json or len(ready) > 1:
        _answer_batch(loaded, ready, sampling, decode, json)
    else:
        _stream(loaded, ready[0], sampling, decode)


def _stream(model: "LanguageModel", prompt: "Prompt", sampling: "SamplingParams", decode: "DecodeConfig") -> None:
    console = make_console()
    with Notice("compiling"):
        answering = model.start([prompt], sampling, decode)
    for pieces in answering:
        for piece in pieces[0]:
            show_piece(console, piece)
    console.print()
    print(statistics(answering.generations()[0]), file=sys.stderr)


def _answer_batch(
    model: "LanguageModel",
    prompts: Sequence["Prompt"],
    sampling: "SamplingParams",
    decode: "DecodeConfig",
    json: bool,
) -> None:
    with Notice("compiling"):
        answering = model.start(prompts, sampling, decode, streaming=False)
    with Notice("decoding"):
        for _ in answering:
            pass
    for number, answer in enumerate(answering.generations(), 1):
        if json:
            print(_json_line(answer.to_dict()))
        else:
            print(f"==> {number} <==\n{printable(answer.text)}", flush=True)
            print(statistics(answer), file=sys.stderr)


def _compare(
    model: "LanguageModel",
    prompts: Sequence["Prompt"],
    sampling: "SamplingParams",
    decode: "DecodeConfig",
    json: bool,
) -> None:
    from idlm_jax.evaluation.equivalence import compare

    if decode.stride == 1:
        raise UserError("--compare sets strided decoding against AR, which is --stride 1; give a larger stride")
    comparisons = compare(
        model, prompts, sampling, [decode], say=lambda what: print(f"decoding by {what} …", file=sys.stderr, flush=True)
    )
    console = make_console()
    for comparison in comparisons:
        if json:
            print(_json_line(_comparison_as_dict(comparison)))
        else:
            show_comparison(console, model, comparison)


def _comparison_as_dict(comparison: "Comparison") -> dict[str, Any]:
    return {
        "ar": comparison.reference.to_dict(),
        "isd": comparison.candidates[0].to_dict(),
        "identical": comparison.identical,
        "first_difference": comparison.first_differences[0],
    }


def _json_line(value: dict[str, Any]) -> str:
    return jsonlib.dumps(value, ensure_ascii=False)


def _read_prompts(prompt: Sequence[str], messages: Path | None, system: str | None, raw: bool) -> list["Prompt"]:
    if raw and (messages is not None or system is not None):
        raise UserError("--raw takes the prompt as it stands: it goes with neither --messages nor --system")
    if prompt and messages is not None:
        raise UserError("give --prompt or --messages, not both")
    if messages is not None:
        return [read_messages(messages, system)]
    texts = list(prompt) or [_read_stdin()]
    if not all(text.strip() for text in texts):
        raise UserError("the prompt is empty")
    return list(texts)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt, --messages, or text on standard input")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None


def read_messages(path: Path, system: str | None = None) -> list[dict[str, str]]:
    """A chat out of a JSON file, with a system message in front if one is given; raises UserError."""
    try:
        chat = jsonlib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (jsonlib.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(chat, list) or not chat:
        raise UserError(f'{path}: expected a list of {{"role": …, "content": …}}')
    for number, message in enumerate(chat, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f'{path}: message {number} is not a {{"role": …, "content": …}} of two texts')
        if message["role"] not in ROLES:
            known = f"one of {', '.join(ROLES)}"
            raise UserError(
                f"{path}: message {number} has the unknown role '{message['role']}' ({known})"
                f"{did_you_mean(message['role'], ROLES)}"
            )
    if system is None:
        return chat
    if chat[0]["role"] == "system":
        raise UserError(f"{path} has a system message already; leave --system out")
    return [{"role": "system", "content": system}, *chat]
