"""Training text from the model itself: answers to given prompts, or whole exchanges from the bare chat prefix.

Text that the model writes at temperature 1 is what its mask rows have to foresee when it decodes (design.md 6).
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from idlm_jax.data.chat import Message
from idlm_jax.data.tokens import Document, TokenStore, TokenStoreWriter, tokenizer_hash
from idlm_jax.decoding.admission import Answer, Request
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.refill import Pool, SlotBatch
from idlm_jax.decoding.step import Policy
from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSSES = ("assistant", "sampled")
# Rounds between two looks at which texts have ended: a place is idle for one and a half times as many on average.
ROUNDS_PER_CALL = 8
# A kill loses the text of at most this long.
FLUSH_SECONDS = 30.0
# Below this, pools of smaller places gain nothing.
_POOLS_FROM_TOKENS, _POOLS_FROM_PLACES = 256, 8
# A question longer than this part of max_tokens is dropped. SmolLM2 begins one text in five without ever asking
# anything; written to the end, they would take a third of the time.
_QUESTION_SHARE = 4
# So many documents without one to keep: there will be none.
_HOPELESS = 1000
# Where the question stands when the template is rendered to be taken apart.
_QUESTION = "⟨question⟩"


@dataclass(frozen=True)
class SynthesisConfig:
    """What to sample; give ``documents`` or ``tokens``, or neither to answer every prompt."""

    documents: int | None = None
    # Sampled tokens, of documents that are kept.
    tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    # Of a document, the template's tokens and the prompt included.
    max_tokens: int = 1024
    # Documents in progress.
    batch_size: int = 256
    # A document is a function of (prompt, seed, its number, sampling parameters).
    seed: int = 0
    # Targets: "assistant", the answers; "sampled", also the questions that the model wrote.
    loss: str = "assistant"
    samples_per_prompt: int = 1
    # N, the most tokens a forward pass can emit; the documents are the same for each.
    stride: int = 1

    def validate(self, with_prompts: bool) -> None:
        """Raise UserError naming the first setting that is out of range or makes no sense."""
        SamplingParams(self.temperature, self.top_k, self.top_p, self.seed, self.max_tokens).validate()
        self.policy()
        for name in ("documents", "tokens", "batch_size", "samples_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.documents is not None and self.tokens is not None:
            raise UserError("give documents or tokens, not both")
        if self.loss not in LOSSES:
            raise UserError(f"unknown loss '{self.loss}' (one of {', '.join(LOSSES)}){did_you_mean(self.loss, LOSSES)}")
        if not with_prompts and self.documents is None and self.tokens is None:
            raise UserError("without prompts there is no end: say how many tokens or documents to sample")
        if self.temperature == 0 and (not with_prompts or self.samples_per_prompt > 1):
            raise UserError("at temperature 0 every sample of a prompt is the same; give a temperature, 1 for training")

    def policy(self) -> Policy:
        """How to decode; raises UserError for a stride that does not exist."""
        return DecodeConfig(stride=self.stride).policy()

    def identity(self) -> dict[str, Any]:
        """What an interrupted run must have in common with the one that resumes it: all but how fast it goes."""
        settings = asdict(self)
        del settings["batch_size"]
        return settings


@dataclass
class Counts:
    """What became of the documents so far."""

    documents: int = 0
    sampled_tokens: int = 0
    # Kept, but ended by max_tokens.
    cut_documents: int = 0
    # Not kept: an empty or endless question, an empty answer, or a prompt that leaves no room for one.
    dropped_documents: int = 0

    def add(self, sample: "Sample | None") -> None:
        """Count one more document; None is one that was dropped."""
        if sample is None:
            self.dropped_documents += 1
            return
        self.documents += 1
        self.sampled_tokens += sample.sampled_tokens
        self.cut_documents += sample.cut


@dataclass(frozen=True)
class Sample:
    """A document and how it came about."""

    document: Document
    sampled_tokens: int
    cut: bool


@dataclass(frozen=True)
class Progress:
    """How far a synthesis is."""

    # Of all finished documents, also those that wait for an earlier one.
    counts: Counts
    # Sampled in this run, after compilation, and the seconds that it took.
    tokens: int
    seconds: float


@dataclass(frozen=True)
class ChatFrame:
    """What the chat template puts around the first question."""

    prefix: tuple[int, ...]
    # The token that ends the question.
    end: int
    # From there to the answer.
    header: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> Self:
        """Take apart what the template makes of one question; raises UserError where that cannot be done."""
        if not tokenizer.chat_template:
            raise UserError("this model has no chat template, so it cannot write questions; give it prompts")
        chat = [{"role": "user", "content": _QUESTION}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        before, found, behind = text.partition(_QUESTION)
        prefix, tail = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (before, behind)
        )
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if not found or not prefix or not tail or tail[0] not in special:
            raise UserError(
                "the chat template ends a question with no special token, so the model cannot write questions; give "
                "it prompts"
            )
        return cls(tuple(prefix), tail[0], tuple(tail[1:]))


class Author:
    """Makes the requests of each document and puts their texts together.

    From the bare prefix a document takes two requests: the question, up to its end-of-turn token, and the answer. The
    second one has the template's own header in its prompt, so that every document follows the template exactly, at the
    cost of prefilling the question again: far less than sampling it.
    """

    def __init__(self, model: LanguageModel, config: SynthesisConfig, prompts: Sequence[Sequence[Message]] | None):
        config.validate(prompts is not None)
        context = model.config.max_position_embeddings
        if config.max_tokens > context:
            raise UserError(f"documents of {config.max_tokens} tokens exceed the model's context of {context}")
        self._model, self._config, self._prompts = model, config, prompts
        self._frame = ChatFrame.of(model.tokenizer) if prompts is None else None
        if self._frame and self._longest_question(self._frame) < 1:
            template = len(self._frame.prefix) + len(self._frame.header)
            raise UserError(f"documents of {config.max_tokens} tokens hold little beside the template's {template}")
        self._ends = () if self._frame is None else (self._frame.end,)
        self._first_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])

    @property
    def prefix_text(self) -> str | None:
        """What every document begins with; None where prompts are given."""
        return None if self._frame is None else str(self._model.tokenizer.decode(list(self._frame.prefix)))

    @property
    def available(self) -> int | None:
        """How many documents there can be; None for any number."""
        return None if self._prompts is None else len(self._prompts) * self._config.samples_per_prompt

    def first_request(self, number: int) -> Request | None:
        """The request that begins a document; None if its prompt leaves no room for an answer."""
        if self._frame is not None:
            return self._request(number, 0, self._frame.prefix, self._longest_question(self._frame))
        assert self._prompts is not None
        prompt = self._model.encode(self._prompts[number // self._config.samples_per_prompt])
        room = self._config.max_tokens - len(prompt)
        return self._request(number, 0, prompt, room) if room > 0 else None

    def go_on(self, finished: Answer) -> "Request | Sample | None":
        """What follows a finished request: another one, the document, or None if it is to be dropped."""
        request, tokens = finished.request, finished.emission.tokens
        prompt = np.array(request.prompt, np.int32)
        if self._frame is not None and len(prompt) == len(self._frame.prefix):
            if len(tokens) < 2 or tokens[-1] != self._frame.end:
                return None
            opening = (*request.prompt, *tokens.tolist(), *self._frame.header)
            return self._request(request.id, 1, opening, self._config.max_tokens - len(opening))
        ended = tokens[-1] in (*self._ends, *self._model.config.eos_token_ids)
        if ended and len(tokens) == 1:
            return None
        loss_mask = np.arange(len(prompt) + len(tokens)) >= len(prompt)
        sampled = len(tokens)
        if self._frame is not None:
            question = slice(len(self._frame.prefix), len(prompt) - len(self._frame.header))
            sampled += question.stop - question.start
            if self._config.loss == "sampled":
                loss_mask[question] = True
        return Sample(Document(np.concatenate([prompt, tokens]), loss_mask), sampled, not ended)

    def _longest_question(self, frame: ChatFrame) -> int:
        room = self._config.max_tokens - len(frame.prefix) - len(frame.header) - 1
        return min(room, self._config.max_tokens // _QUESTION_SHARE)

    def _request(self, number: int, phase: int, prompt: Sequence[int], max_tokens: int) -> Request:
        config = self._config
        # Neighbouring seeds make independent noise, and no two requests of a synthesis share one.
        seed = (self._first_seed + 2 * number + phase) % 2**32
        sampling = SamplingParams(
            config.temperature, config.top_k, config.top_p, seed, max_tokens, stop_token_ids=self._ends
        )
        return Request(number, prompt, sampling)


def synthesize(
    model: LanguageModel,
    target: str | Path,
    config: SynthesisConfig,
    prompts: Sequence[Sequence[Message]] | None = None,
    *,
    name: str,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> TokenStore:
    """Sample documents into a token store, in the order of their numbers, which only ``config`` and prompts decide.

    Without ``prompts`` the model, which the store's metadata call ``name``, writes the questions too. ``resume`` goes
    on with an interrupted run of the same model name, config and prompts: it samples again what the last flush had not
    saved. Raises UserError for settings that cannot work, a target that exists, and a full disk.
    """
    author = Author(model, config, prompts)
    places = pools(config, model.copies)
    chats = None if prompts is None else hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    writer = TokenStoreWriter(
        target,
        vocab_size=model.config.vocab_size,
        tokenizer_hash=tokenizer_hash(model.tokenizer),
        settings={"model": name, "prompts": chats, **config.identity()},
        resume=resume,
    )
    with writer:
        state = writer.state or {"next": 0, "counts": asdict(Counts())}
        run = _Run(author, config, writer, state["next"], Counts(**state["counts"]))
        try:
            speed = run.sample(SlotBatch(model.model, config.policy(), places), on_progress)
        except KeyboardInterrupt:
            run.flush()
            raise
        run.flush()
        counts = run.written
        if not counts.documents:
            raise UserError(f"none of {counts.dropped_documents} documents had a question and an answer to keep")
        writer.finish(
            {
                "counts": {key: value for key, value in asdict(counts).items() if key != "documents"},
                "sources": [{"name": name, "documents": counts.documents}],
                "prefix": author.prefix_text,
                "speed": {**speed, "batch_size": config.batch_size},
                "note": "made by idlm data synthesize",
            }
        )
    return TokenStore.open(target)


def pools(config: SynthesisConfig, copies: int = 1) -> list[Pool]:
    """Places for ``batch_size`` documents: 3/8 of them hold a quarter of ``max_tokens``, 2/8 a half, 3/8 all.

    Attention then reads three fifths of what it would with places of one size. That many large places keep up even
    where two documents in five reach ``max_tokens``, as SmolLM2's do at 1024; with fewer, most of the rest would wait.
    Where several ``copies`` of the model split the documents, places are of one size: split one by one, pools would
    leave no document with the copy that has its rows.
    """
    places, capacity = config.batch_size, config.max_tokens
    if places % copies:
        raise UserError(f"batch_size {places} cannot be split over {copies} copies of the model")
    if copies > 1 or capacity < _POOLS_FROM_TOKENS or places < _POOLS_FROM_PLACES:
        return [Pool(places, capacity)]
    small, middle = 3 * places // 8, places // 4
    return [Pool(small, capacity // 4), Pool(middle, capacity // 2), Pool(places - small - middle, capacity)]


class _Run:
    """Documents in progress, finished ones that wait for an earlier one, and the writer."""

    def __init__(self, author: Author, config: SynthesisConfig, writer: TokenStoreWriter, first: int, counts: Counts):
        self._author, self._config, self._writer = author, config, writer
        # Numbers of the next document to begin and to write.
        self._begin = self._write = first
        self.written = counts
        self._finished: dict[int, Sample | None] = {}
        self._all = Counts(**asdict(counts))
        self._flushed_at = time.monotonic()

    def sample(self, batch: SlotBatch, on_progress: Callable[[Progress], None]) -> dict[str, float]:
        """Decode until there is enough or nothing left; returns tokens, seconds, and tokens a second."""
        follow_ups: deque[Request] = deque()
        before = self._all.sampled_tokens
        began = None
        while not self._enough():
            batch.submit(self._next_requests(batch.room, follow_ups))
            if not batch.busy:
                break
            if began is None:
                batch.run(0)  # compiles
                began = time.monotonic()
            for finished in batch.run(ROUNDS_PER_CALL):
                following = self._author.go_on(finished)
                if isinstance(following, Request):
                    follow_ups.append(following)
                else:
                    self._settle(finished.request.id, following)
            self._write_ready()
            if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self.flush()
            if not self._all.documents and self._all.dropped_documents >= _HOPELESS:
                raise UserError(
                    f"none of {self._all.dropped_documents} documents had a question and an answer: this model does "
                    "not write chats by itself; give it prompts, or more max_tokens"
                )
            on_progress(Progress(self._all, self._all.sampled_tokens - before, time.monotonic() - began))
        seconds = time.monotonic() - began if began is not None else 0.0
        tokens = self.written.sampled_tokens - before
        return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else 0.0}

    def flush(self) -> None:
        """Save the documents that are ready, and where to go on."""
        self._write_ready()
        self._writer.flush({"next": self._write, "counts": asdict(self.written)})
        self._flushed_at = time.monotonic()

    def _enough(self) -> bool:
        config = self._config
        if config.tokens is not None:
            return self.written.sampled_tokens >= config.tokens
        return config.documents is not None and self.written.documents >= config.documents

    def _next_requests(self, room: int, follow_ups: deque[Request]) -> Iterator[Request]:
        """Requests for ``room`` free places: answers to finished questions first, then new documents."""
        while room > 0 and (follow_ups or self._may_begin()):
            if follow_ups:
                yield follow_ups.popleft()
                room -= 1
                continue
            number, self._begin = self._begin, self._begin + 1
            request = self._author.first_request(number)
            if request is None:
                self._settle(number, None)
                continue
            yield request
            room -= 1

    def _may_begin(self) -> bool:
        available = self._author.available
        if available is not None and self._begin >= available:
            return False
        if self._config.documents is None:
            return True
        # Those in progress may all be kept.
        in_progress = self._begin - self._write - len(self._finished)
        return self._all.documents + in_progress < self._config.documents

    def _settle(self, number: int, sample: Sample | None) -> None:
        self._finished[number] = sample
        self._all.add(sample)

    def _write_ready(self) -> None:
        while self._write in self._finished and not self._enough():
            sample = self._finished.pop(self._write)
            self._write += 1
            self.written.add(sample)
            if sample is not None:
                self._writer.append(*sample.document)
