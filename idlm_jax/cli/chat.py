"""``idlm chat``: talk with a model in the terminal, one loaded here or one behind a server."""

import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from idlm_jax.cli.flags import DecodeFlags, ModelFlags, SamplingFlags, check_adapter, check_can_draft
from idlm_jax.cli.render import ACCEPTED_DRAFT, Notice, make_console, show_piece, statistics
from idlm_jax.decoding.text import Piece
from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.serving.client import Client

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
    model: Positional[
        Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(required without --url)")]
    ] = None,
    *,
    url: Annotated[str | None, arg(metavar="URL", help_behavior_hint="(default: load MODEL here)")] = None,
    api_key: Annotated[str | None, arg(metavar="KEY", help_behavior_hint="(default: none)")] = None,
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
      idlm chat --url http://127.0.0.1:8000

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name); with --url, one
            of the server's names (default: its first).
        url: Talk with a server of the OpenAI API, as idlm serve is one.
        api_key: What the server asks for.
        system: System message of the conversation.
        show_drafts: Print accepted drafts in a second colour (not with --url), and statistics after every answer.
    """
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() history and line editing
    if url is not None:
        if model_flags != ModelFlags() or decode_flags != DecodeFlags():
            raise UserError("with --url the server says how to load and decode; leave those flags out")
        client = Client(url, api_key)
        _talk(
            RemoteSession(client, client.model(model), sampling_flags, system=system),
            make_console(),
            show_drafts,
        )
        return
    if model is None:
        raise UserError("give a MODEL to load, or --url to talk with a server")
    if api_key is not None:
        raise UserError("--api-key goes with --url")
    decode = decode_flags.config()
    sampling = sampling_flags.params(decode)
    loaded = model_flags.load(model)
    check_adapter(loaded, decode_flags)
    check_can_draft(model, loaded, decode)
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{model} has no chat template; use 'idlm generate --raw' to continue plain text")
    _talk(Session(loaded, sampling, decode, system=system), make_console(), show_drafts)


@dataclass
class Conversation(ABC):
    """What has been said, and how to go on with it."""

    system: str | None = field(default=None, kw_only=True)
    messages: list[dict[str, str]] = field(default_factory=list, kw_only=True)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, console: Console, show_drafts: bool) -> None:
        """Answer one message; where there can be no answer, say so and leave the conversation as it was."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        try:
            self.answer(console, show_drafts)
        except UserError as error:
            del self.messages[-2:]
            _remark(console, str(error))
        except KeyboardInterrupt:
            console.print()
            if not self.messages[-1]["content"]:
                del self.messages[-2:]  # nothing was said: as if it had not been asked
            _remark(console, "stopped; the conversation goes on")

    @abstractmethod
    def answer(self, console: Console, show_drafts: bool) -> None:
        """Print an answer to all messages but the last and add it to that one; raises UserError if there is none."""

    def say(self, piece: Piece, console: Console, show_drafts: bool) -> None:
        """Print new text of an answer and keep it."""
        self.messages[-1]["content"] += piece.text
        show_piece(console, piece, show_drafts)


@dataclass
class Session(Conversation):
    """A conversation with a model that is loaded here."""

    model: "LanguageModel"
    sampling: "SamplingParams"
    decode: "DecodeConfig"

    def room(self) -> int:
        """Tokens that the context has left for an answer to the messages as they stand."""
        return self.model.config.max_position_embeddings - len(self.model.encode(self.messages[:-1]))

    def answer(self, console: Console, show_drafts: bool) -> None:
        """Print an answer, as long as the context has room for."""
        room = self.room()
        if room < 1:
            context = self.model.config.max_position_embeddings
            raise UserError(
                f"the conversation would fill the model's context of {context} tokens; type /reset, or say less"
            )
        if room < self.sampling.max_tokens:
            _remark(
                console, f"the context has room for {room} more tokens, so the answer may be cut; /reset makes room"
            )
        sampling = replace(self.sampling, max_tokens=min(room, self.sampling.max_tokens))
        with Notice("compiling"):
            answering = self.model.start([self.messages[:-1]], sampling, self.decode)
        for pieces in answering:
            for piece in pieces[0]:
                self.say(piece, console, show_drafts)
        console.print()
        answer = answering.generations()[0]
        if show_drafts:
            _remark(console, statistics(answer))
        elif answer.finish_reason == "length":
            _remark(console, _cut(sampling.max_tokens))


@dataclass
class RemoteSession(Conversation):
    """A conversation with a model behind a server."""

    client: Client
    model: str
    sampling: SamplingFlags

    def answer(self, console: Console, show_drafts: bool) -> None:
        """Print an answer as the server sends it."""
        # Not `in`: a seed of 0 equals False.
        given = {name: value for name, value in asdict(self.sampling).items() if value is not None}
        asked = {name: value for name, value in given.items() if value is not False and value != ()}
        body = {"temperature": 0.0, **asked, "model": self.model, "messages": self.messages[:-1]}
        reason, usage = None, {}
        for event in self.client.chat(body):
            for choice in event["choices"]:
                self.say(Piece(choice["delta"].get("content") or "", False), console, False)
                reason = choice["finish_reason"] or reason
            usage = event.get("usage") or usage
        console.print()
        if show_drafts and "idlm" in usage:
            ours = usage["idlm"]
            forwards = f"{ours['forwards']} forwards, {ours['tokens_per_forward']:.2f} a forward"
            _remark(console, f"{usage['completion_tokens']} tokens in {forwards}")
        elif reason == "length":
            _remark(console, _cut(self.sampling.max_tokens))


def _cut(max_tokens: int) -> str:
    return f"cut at {max_tokens} tokens (--max-tokens)"


def _talk(session: Conversation, console: Console, show_drafts: bool) -> None:
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


def _command(line: str, session: Conversation, console: Console) -> None:
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
