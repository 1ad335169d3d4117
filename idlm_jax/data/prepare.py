"""Chats and text to a token store: tokenised in parallel, in the order of the sources, resumable.

A source is read in parts of about a megabyte that end with a line. Workers tokenise parts; what comes out does not
depend on how many there are.
"""

import hashlib
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from idlm_jax.checkpoint.companions import without_torch_advice
from idlm_jax.data.chat import encode_chat, encode_text, parse_document
from idlm_jax.data.tokens import CHUNK, Document, TokenStore, TokenStoreWriter, tokenizer_hash, vocabulary_size
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".txt")
_PART_BYTES = 2**20
# Fewer parts than these are done before worker processes have started.
_PARTS_WORTH_WORKERS = 8
_COUNTS = ("cut_documents", "dropped_documents", "bad_lines")


@dataclass(frozen=True)
class Source:
    """A file to read."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """Whole lines of a source."""

    source: int  # index of the source
    first_line: int  # number of the first line, from 1
    end: int  # byte of the source where the next part begins
    content: bytes
    is_text: bool  # a part of one document of plain text, not lines of JSON
    is_first: bool
    is_last: bool


@dataclass
class Encoded:
    """What became of a part."""

    documents: list[Document] = field(default_factory=list)
    cut_documents: int = 0  # of them, chats that lost what lies beyond the maximal length
    dropped_documents: int = 0  # documents without a target
    bad: list[tuple[int, str]] = field(default_factory=list)  # line number and what is wrong with it


def read_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Look at the files and hash them; raises UserError for one that is missing, empty or of an unknown kind."""
    if not paths:
        raise UserError("no source: name one or more .jsonl or .txt files")
    sources = []
    for path in [Path(path).expanduser() for path in paths]:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name its files, for example {path / '*.jsonl'}")
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: unknown kind of file; chats and texts are read from {' and '.join(SUFFIXES)}")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if not size:
            raise UserError(f"{path}: the file is empty")
        sources.append(Source(path, size, digest))
    return sources


def prepare(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    target: str | Path,
    *,
    max_length: int,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> TokenStore:
    """Write the documents of all sources, in order, as a token store; ``progress`` hears of the bytes read.

    Each line of a .jsonl file is a document (``chat.parse_document`` lists the forms), each .txt file one. Chats are
    cut at ``max_length`` tokens; plain text ends with the end-of-text token, is split into pieces of at most
    ``max_length``, and all of it is target. Documents without a target are dropped. An interrupted run goes on where
    it was when called again. ``workers`` defaults to the number of processors. Raises UserError for a line that is no
    document (unless ``skip_bad``), naming file and line, and for sources without a document.
    """
    if max_length < 2:
        raise UserError(f"a maximal length of {max_length} leaves nothing to predict; give at least 2")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers cannot work; give at least 1")
    settings = {"max_length": max_length, "sources": [source.sha256 for source in sources]}
    writer = TokenStoreWriter(
        target,
        vocab_size=vocabulary_size(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        settings=settings,
        resume=True,
    )
    encoder = PartEncoder(tokenizer, max_length)
    with writer:
        state = _State(**writer.state) if writer.state else _State(documents=[0] * len(sources))
        progress(sum(source.size for source in sources[: state.source]) + state.offset)
        for part, encoded in _encode_all(_parts(sources, state), encoder, _worker_count(workers, sources)):
            if encoded.bad and (part.is_text or not skip_bad):
                line, reason = encoded.bad[0]
                advice = "" if part.is_text else "; mend it, or skip such lines with --skip-bad"
                raise UserError(f"{sources[part.source].path}:{line}: {reason}{advice}")
            progress(state.add(part, encoded))
            for document in encoded.documents:
                writer.append(*document)
            if writer.pending_tokens >= CHUNK:
                writer.flush(vars(state))
        writer.flush(vars(state))
        if not writer.documents:
            raise UserError(
                f"{sources[0].path}: no document to train on ({state.counts['dropped_documents']} without a target, "
                f"{state.counts['bad_lines']} bad lines)"
            )
        writer.finish(
            {
                "counts": state.counts,
                "sources": [
                    {"name": source.path.name, "sha256": source.sha256, "size": source.size, "documents": documents}
                    for source, documents in zip(sources, state.documents, strict=True)
                ],
                "note": "made by idlm data prepare",
            }
        )
    return TokenStore.open(target)


class PartEncoder:
    """Tokenises parts; the same in a worker process as in this one."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length

    def __call__(self, part: Part) -> Encoded:
        """The documents of a part; what is wrong with a line is said in the result."""
        encoded = Encoded()
        if part.is_text:
            try:
                text = part.content.decode("utf-8-sig" if part.is_first else "utf-8")
            except UnicodeDecodeError as error:
                encoded.bad.append((part.first_line + part.content.count(b"\n", 0, error.start), "not UTF-8 text"))
            else:
                self._add_text(encoded, text, part.is_first, part.is_last)
            return encoded
        for number, line in enumerate(part.content.split(b"\n"), part.first_line):
            if not line.strip():
                continue
            try:
                document = parse_document(line)
                if isinstance(document, str):
                    self._add_text(encoded, document)
                else:
                    self._add_chat(encoded, encode_chat(self._tokenizer, document))
            except UserError as error:
                encoded.bad.append((number, str(error)))
        return encoded

    def _add_text(self, encoded: Encoded, text: str, begin: bool = True, end: bool = True) -> None:
        tokens = encode_text(self._tokenizer, text, begin, end)
        for start in range(0, len(tokens), self._max_length):
            piece = tokens[start : start + self._max_length]
            self._add(encoded, Document(piece, np.ones(len(piece), bool)))

    def _add_chat(self, encoded: Encoded, chat: Document) -> None:
        kept = Document(chat.tokens[: self._max_length], chat.loss_mask[: self._max_length])
        encoded.cut_documents += self._add(encoded, kept) and len(chat.tokens) > self._max_length

    def _add(self, encoded: Encoded, document: Document) -> bool:
        # The first token is predicted by nothing.
        has_target = bool(document.loss_mask[1:].any())
        if has_target:
            encoded.documents.append(document)
        else:
            encoded.dropped_documents += 1
        return has_target


@dataclass
class _State:
    """Where to go on, and what has been counted so far; saved with every flush."""

    documents: list[int]  # of each source
    source: int = 0
    offset: int = 0
    line: int = 1
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))

    def add(self, part: Part, encoded: Encoded) -> int:
        """Count a part as done; returns its size in bytes."""
        self.source, self.offset = (part.source + 1, 0) if part.is_last else (part.source, part.end)
        self.line = 1 if part.is_last else part.first_line + part.content.count(b"\n")
        self.documents[part.source] += len(encoded.documents)
        self.counts["cut_documents"] += encoded.cut_documents
        self.counts["dropped_documents"] += encoded.dropped_documents
        self.counts["bad_lines"] += len(encoded.bad)
        return len(part.content)


def _parts(sources: Sequence[Source], state: _State) -> Iterator[Part]:
    """What remains to be read."""
    # The state moves while parts are read ahead.
    first, offset, line = state.source, state.offset, state.line
    for index, source in enumerate(sources[first:], first):
        with source.path.open("rb") as file:
            file.seek(offset)
            while lines := file.readlines(_PART_BYTES):
                content = b"".join(lines)
                end = offset + len(content)
                is_text = source.path.suffix.lower() == ".txt"
                yield Part(index, line, end, content, is_text, offset == 0, end >= source.size)
                offset, line = end, line + len(lines)
        offset, line = 0, 1


def _worker_count(workers: int | None, sources: Sequence[Source]) -> int:
    parts = sum(-(-source.size // _PART_BYTES) for source in sources)
    return 1 if parts < _PARTS_WORTH_WORKERS else min(workers or os.cpu_count() or 1, parts)


def _encode_all(parts: Iterator[Part], encoder: PartEncoder, workers: int) -> Iterator[tuple[Part, Encoded]]:
    """Every part with its result, in order; a few parts a worker are under way at a time."""
    if workers == 1:
        for part in parts:
            yield part, encoder(part)
        return
    under_way: deque[tuple[Part, Future[Encoded]]] = deque()
    # Not forked: this process may run threads of JAX and of TensorStore.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (pickle.dumps(encoder),))
    try:
        for part in parts:
            under_way.append((part, pool.submit(_encode, part)))
            if len(under_way) > 3 * workers:
                done, result = under_way.popleft()
                yield done, result.result()
        for done, result in under_way:
            yield done, result.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for want of memory; run the command again with fewer workers: it goes on "
            "where it was"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# The encoder of a worker process, which lives for one call of ``prepare``; None in any other process.
_encoder: PartEncoder | None = None


def _start_worker(encoder: bytes) -> None:
    global _encoder
    # An interrupt is the business of the parent, and a parent that was killed has no more work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with without_torch_advice():
        _encoder = pickle.loads(encoder)


def _exit_with_parent() -> None:
    parent: Any = parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode(part: Part) -> Encoded:
    assert _encoder is not None
    return _encoder(part)
