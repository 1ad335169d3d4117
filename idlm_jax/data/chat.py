"""Chats and text from files, and chats as tokens with a loss mask on what the assistant says.

The loss mask comes from the chat template itself, whichever it is: the assistant's part of a rendered chat lies between
the prompt that the template makes for it and the token that ends its turn.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from idlm_jax.data.tokens import Document
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys "role" and "content", and where the data has it "reasoning_content", which Qwen3's template reads.
Message = dict[str, str]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_FORMS = '"messages", "conversations", "prompt" with "response" or "completion", or "text"'
# Stands for the end of what the assistant says while the template is asked where that is.
_MARK = "⟨end⟩"


def parse_document(line: bytes) -> list[Message] | str:
    """One line of a JSONL file: a chat, or plain text.

    Knows {"messages": [{"role", "content"}]} (OpenAI), {"conversations": [{"from", "value"}]} (ShareGPT), {"prompt",
    "response" or "completion"} and {"text"}; other keys are ignored. Raises UserError with the reason, without a place.
    """
    record = _parse_record(line)
    if "messages" in record or "conversations" in record:
        return _parse_chat(record)
    if "prompt" in record:
        answer = "response" if "response" in record else "completion"
        if answer not in record:
            raise UserError('"prompt" without "response" or "completion"')
        return [_say("user", record, "prompt"), _say("assistant", record, answer)]
    if "text" in record:
        return _text(record, "text")
    raise UserError(f"expected {_FORMS}; the keys here are: {', '.join(list(record)[:8]) or 'none'}")


def read_prompts(path: str | Path) -> list[list[Message]]:
    """Every chat of a JSONL file up to its last user message; {"prompt"} needs no answer here.

    Raises UserError that names file and line for whatever is no such chat, and for a file without one.
    """
    path = Path(path)
    prompts = []
    for number, line in read_lines(path):
        try:
            record = _parse_record(line)
            bare = "prompt" in record and "messages" not in record and "conversations" not in record
            chat = [_say("user", record, "prompt")] if bare else _parse_chat(record)
            last = max((i for i, message in enumerate(chat) if message["role"] == "user"), default=None)
            if last is None:
                raise UserError("no user message")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        prompts.append(chat[: last + 1])
    if not prompts:
        raise UserError(f"{path}: the file is empty")
    return prompts


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file (.gz: packed) that are not blank, numbered from 1; raises UserError if it cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> Document:
    """The tokens of a chat as its template renders it, with a loss mask on the assistant's tokens.

    Targets are what the assistant says and the token that ends its turn, not the header of its role. Where the
    template leaves something out (Qwen3: the thinking of earlier turns) it is no target either. Raises UserError for a
    tokenizer without template, a chat that the template refuses, and a template whose parts cannot be told apart.
    """
    text = _render(tokenizer, messages)
    tokens = _encode(tokenizer, text)
    loss_mask = np.zeros(len(tokens), bool)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return Document(tokens, loss_mask)
    mark = _MARK * (1 + text.count(_MARK))  # longer than any run of marks that the chat itself may hold
    ending, end_token = _end_of_turn(tokenizer, messages[: turns[0]], mark)
    end_id = tokenizer.convert_tokens_to_ids(end_token)
    ends = np.flatnonzero(tokens == end_id)
    for turn in turns:
        start, stop = _find_turn(tokenizer, messages, turn, text, ending, mark)
        # The token that ends this turn is always a token of its own, so it is found by counting.
        last = ends[text.count(end_token, 0, stop) - 1]
        loss_mask[_tokens_before(tokenizer, tokens, text[:start]) : last + 1] = True
    return Document(tokens, loss_mask)


def encode_text(
    tokenizer: "PreTrainedTokenizerBase", text: str, begin: bool = True, end: bool = True
) -> Int32[np.ndarray, " L"]:
    """The tokens of plain text: begin-of-text where the tokenizer wants it, end-of-text always.

    A part of a longer text leaves out what is not its own with ``begin`` and ``end``. Raises UserError for a tokenizer
    without end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer names no end-of-text token (eos_token), which plain text needs")
    wants_begin = tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    head = [tokenizer.bos_token_id] if begin and wants_begin else []
    tail = [tokenizer.eos_token_id] if end else []
    return np.concatenate([np.array(head, np.int32), _encode(tokenizer, text), np.array(tail, np.int32)])


def _parse_record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError("not valid JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise UserError("expected a JSON object")
    return record


def _parse_chat(record: dict[str, Any]) -> list[Message]:
    if "messages" in record:
        return _parse_messages(record["messages"], "messages", "role", "content", _ROLES)
    if "conversations" in record:
        return _parse_messages(record["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)
    raise UserError('expected "messages", "conversations" or "prompt"')


def _parse_messages(value: Any, name: str, role_key: str, text_key: str, roles: dict[str, str]) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f'"{name}" is not a list of messages')
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in (role_key, text_key)):
            raise UserError(f'message {number} is not a {{"{role_key}": …, "{text_key}": …}} of two texts')
        if item.get("tool_calls"):
            raise UserError(f"message {number} calls tools, which training data cannot do yet")
        role = item[role_key]
        if role not in roles:
            known = f"one of {', '.join(roles)}"
            raise UserError(f"message {number} has the unknown role '{role}' ({known}){did_you_mean(role, roles)}")
        message = {"role": roles[role], "content": item[text_key]}
        if isinstance(item.get("reasoning_content"), str):
            message["reasoning_content"] = item["reasoning_content"]
        messages.append(message)
    if messages[0]["role"] == "assistant":
        raise UserError("the chat begins with the assistant; a user message has to come first")
    return messages


def _say(role: str, record: dict[str, Any], key: str) -> Message:
    return {"role": role, "content": _text(record, key)}


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value:
        raise UserError(f'"{key}" is not a text, or empty')
    return value


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], prompt: bool = False) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, so chats cannot be rendered; use plain text")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise UserError(f"the chat template refuses this chat: {' '.join(str(error).split())}") from None


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> Int32[np.ndarray, " L"]:
    # Without verbose=False transformers warns of texts that are longer than the model.
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", before: Sequence[Message], mark: str) -> tuple[str, str]:
    """What the template writes behind the assistant's words up to the token that ends the turn, and that token."""
    rendered = _render(tokenizer, [*before, {"role": "assistant", "content": mark}])
    behind = rendered.rpartition(mark)[2]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = [(behind.find(token), token) for token in special if token in behind]
    if mark not in rendered or not found:
        raise UserError(
            "the chat template ends the assistant's turn with no special token, so no loss mask can be made"
        )
    position, token = min(found)
    return behind[: position + len(token)], token


def _find_turn(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], turn: int, text: str, ending: str, mark: str
) -> tuple[int, int]:
    """Where in the rendered text the assistant's turn begins, after its header, and ends, with its end token."""
    prompt = _render(tokenizer, messages[:turn], prompt=True)
    # The same chat with more to say in this turn: what comes behind that is what comes behind the turn.
    longer = [*messages]
    longer[turn] = {**messages[turn], "content": messages[turn]["content"] + mark}
    _, found, behind = _render(tokenizer, longer).rpartition(mark)
    stable = text.startswith(prompt) and found and behind.startswith(ending) and text.endswith(behind)
    start, stop = len(prompt), len(text) - len(behind) + len(ending)
    if not stable or start >= stop:
        raise UserError(
            f"the chat template renders message {turn + 1} differently when other messages follow, so its loss mask "
            "is unknown; end the chat with this message, or use another template"
        )
    return start, stop


def _tokens_before(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray, head: str) -> int:
    """The number of tokens that hold any of the first part of a text; one that crosses its end counts."""
    alone = _encode(tokenizer, head)
    same = tokens[: len(alone)] == alone
    return len(alone) if same.all() else int(same.argmin()) + 1
