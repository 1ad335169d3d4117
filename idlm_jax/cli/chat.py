"""``idlm chat``: talk with a model in the terminal."""

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from idlm_jax.cli.flags import DecodeFlags, Model, ModelFlags, SamplingFlags, check_adapter, check_can_draft
from idlm_jax.cli.render import ACCEPTED_DRAFT, Notice, make_console, show_piece, statistics
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from idlm_jax.decoding.config import DecodeConfig
    from idlm_jax.decoding.generate import SamplingParams
    from idlm_jax.model import LanguageModel

COMMANDS = {
    "/reset": "start a new conversation",
    "/help": "show this",
    "/exit": "leave (or Ctrl-D)",
}


def chat(
    model: Positional[Model],
    *,
    system: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(default: the model's)")] = None,
    show_drafts: bool = False,
    model_flags: Annotated[ModelFlags, arg(name="")],
    decode_flags: Annotated[DecodeFlags, arg(name="")],
    sampling_flags: Annotated[SamplingFlags, arg(name="")],
) -> None:
    """Talk with a model: several turns, answers printed as they come.

    Type /help for commands. Ctrl-C stops an answer and keeps the conversation, Ctrl-D leaves.

    Examples:
      idlm chat checkpoints/i-dlm-8b --show-drafts
      idlm chat models/smollm2 --temperature 0.7 --top-p 0.9 --max-tokens 512

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name).
        system: System message of the conversation.
        show_drafts: Print accepted drafts in a second colour, and statistics after every answer.
    """
    decode = decode_flags.config()
    sampling = sampling_flags.params(decode)
    loaded = model_flags.load(model)
    check_adapter(loaded, decode_flags)
    check_can_draft(model, loaded, decode)
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{model} has no chat template; use 'idlm generate --raw' to continue plain text")
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() history and line editing
    session = Session(loaded, sampling, decode, system)
    _talk(session, make_console(), show_drafts)


@dataclass
class Session:
    """A conversation and how to go on with it."""

    model: "LanguageModel"
    sampling: "SamplingParams"
    decode: "DecodeConfig"
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def room(self) -> int:
        """Tokens that the context has left for an answer to the messages as they stand."""
        return self.model.config.max_position_embeddings - len(self.model.encode(self.messages))

    def ask(self, text: str, console: Console, show_drafts: bool) -> None:
        """Answer one message; without room for an answer, say so and leave the conversation as it was."""
        self.messages.append({"role": "user", "content": text})
        room = self.room()
        if room < 1:
            self.messages.pop()
            context = self.model.config.max_position_embeddings
            _remark(
                console,
                f"the conversation would fill the model's context of {context} tokens; type /reset, or say less",
            )
            return
        if room < self.sampling.max_tokens:
            _remark(
                console, f"the context has room for {room} more tokens, so the answer may be cut; /reset makes room"
            )
        sampling = replace(self.sampling, max_tokens=min(room, self.sampling.max_tokens))
        self.messages.append({"role": "assistant", "content": ""})
        try:
            self._answer(sampling, console, show_drafts)
        except KeyboardInterrupt:
            console.print()
            if not self.messages[-1]["content"]:
                del self.messages[-2:]  # nothing was said: as if it had not been asked
            _remark(console, "stopped; the conversation goes on")

    def _answer(self, sampling: "SamplingParams", console: Console, show_drafts: bool) -> None:
        with Notice("compiling"):
            answering = self.model.start([self.messages[:-1]], sampling, self.decode)
        for pieces in answering:
            for piece in pieces[0]:
                self.messages[-1]["content"] += piece.text
                show_piece(console, piece, show_drafts)
        console.print()
        answer = answering.generations()[0]
        if show_drafts:
            _remark(console, statistics(answer))
        elif answer.finish_reason == "length":
            _remark(console, f"cut at {sampling.max_tokens} tokens (--max-tokens)")


def _talk(session: Session, console: Console, show_drafts: bool) -> None:
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        drafts = f"; accepted drafts are [{ACCEPTED_DRAFT}]{ACCEPTED_DRAFT}[/]" if show_drafts else ""
        console.print(f"[dim]/help lists commands, Ctrl-D leaves[/]{drafts}")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                console.print()
            return
        except KeyboardInterrupt:
            console.print()
            _remark(console, "Ctrl-D or /exit leaves")
            continue
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        if line == "/exit":
            return
        if line.startswith("/"):
            _command(line, session, console)
        elif line:
            session.ask(line, console, show_drafts)


def _command(line: str, session: Session, console: Console) -> None:
    if line == "/reset":
        session.reset()
        _remark(console, "a new conversation")
        return
    if line != "/help":
        _remark(console, f"unknown command '{line}'{did_you_mean(line, COMMANDS)}")
    for name, meaning in COMMANDS.items():
        _remark(console, f"{name:<8}{meaning}")


def _remark(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, soft_wrap=True)
