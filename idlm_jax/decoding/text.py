"""From committed tokens to text: incremental detokenisation, stop strings, and which characters were drafted."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Piece:
    """A run of new text."""

    text: str
    # True when it comes from accepted drafts, False when the verifying rows produced it.
    drafted: bool


class TextBuilder:
    """Turns one request's tokens into text as they are committed.

    Text that could still become a stop string, and bytes that do not yet make a character, are held back.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str], end_ids: Sequence[int]):
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop, self._end_ids = tuple(stop), frozenset(end_ids)
        self._longest = max(map(len, self._stop), default=0)
        self._drafted: list[bool] = []  # one flag a character of ``text``
        self._released = 0
        self._cut = False  # by a stop string
        self.text = ""
        self.token_ids: list[int] = []
        # For every token, where in ``text`` its own begins; tokens that make a character together begin at one place.
        self.offsets: list[int] = []
        # "stop" once an end token or a stop string came, else None.
        self.finish_reason: str | None = None

    @property
    def shown(self) -> int:
        """How many tokens have appeared in the text that was returned; at the end all that no stop string cut off."""
        if self.finish_reason and not self._cut:
            return len(self.token_ids)
        return bisect_left(self.offsets, self._released)

    def feed(self, tokens: Sequence[int], drafted: Sequence[bool]) -> list[Piece]:
        """Add committed tokens; returns the text that is now certain. Tokens after the end are ignored."""
        for token, flag in zip(tokens, drafted, strict=True):
            if self.finish_reason:
                break
            self.token_ids.append(int(token))
            self.offsets.append(len(self.text))
            if token in self._end_ids:
                self.finish_reason = "stop"
                self._flush(self.token_ids[:-1])
                break
            self._append(self._stream.step(self._backend, int(token)) or "", flag)
        return self._release(len(self.text) if self.finish_reason else len(self.text) - self._held_back())

    def finish(self) -> list[Piece]:
        """Release what was held back; an incomplete last character is shown as the tokenizer shows it."""
        if self.finish_reason is None:
            self.finish_reason = "length"
            self._flush(self.token_ids)
        return self._release(len(self.text))

    def _flush(self, token_ids: Sequence[int]) -> None:
        """Add the bytes that never became a character."""
        whole = self._backend.decode(list(token_ids), skip_special_tokens=True)
        if whole.startswith(self.text):
            self._append(whole[len(self.text) :], False)

    def _append(self, text: str, drafted: bool) -> None:
        searched_from = max(0, len(self.text) - self._longest)
        self.text += text
        self._drafted += [drafted] * len(text)
        found = [at for stop in self._stop if (at := self.text.find(stop, searched_from)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish_reason, self._cut = "stop", True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, end: int) -> list[Piece]:
        begin, self._released = self._released, max(end, self._released)
        pieces = []
        for drafted, run in groupby(self._drafted[begin : self._released]):
            text = self.text[begin : begin + len(list(run))]
            pieces.append(Piece(text, drafted))
            begin += len(text)
        return pieces


def token_bytes(tokenizer: "PreTrainedTokenizerFast", count: int) -> list[bytes]:
    """What each of the first ``count`` tokens stands for, also where it is only a part of a character.

    Special tokens stand for their names; numbers that the tokenizer does not know, for nothing.
    """
    backend = tokenizer.backend_tokenizer
    byte_level = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()
    to_bytes = _from_byte_level() if byte_level else _from_plain
    added = backend.get_added_tokens_decoder()
    names = map(backend.id_to_token, range(count))
    return [
        b"" if name is None else name.encode() if number in added else to_bytes(name)
        for number, name in enumerate(names)
    ]


def _from_byte_level() -> Callable[[str], bytes]:
    """Vocabularies whose characters stand for bytes: printable Latin-1 for itself, 256 and on for the others."""
    alphabet = sorted(ByteLevel.alphabet())
    byte = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(byte.values()))
    byte |= dict(zip(alphabet[len(byte) :], others, strict=True))
    return lambda name: bytes(byte[character] for character in name)


def _from_plain(name: str) -> bytes:
    """Vocabularies of text, with a sign for the space and names for single bytes."""
    single = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(single[1]) if single else name.replace("▁", " ").encode()
