"""What the service asks of an engine, and the engine over a continuous batch of places (``decoding.refill``)."""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.generate import PREFILL_CHUNK, SamplingParams
from idlm_jax.decoding.refill import SHORT_PROMPT, Answer, Pool, Request, SlotBatch
from idlm_jax.decoding.step import Policy

# Rounds between two looks at the texts: clients see new text, and a stop string ends one, at most so much later.
ROUNDS_PER_STEP = 4


class Engine(Protocol):
    """Decodes requests side by side; everything but ``check`` is called from one thread."""

    @property
    def places(self) -> int:
        """How many requests are decoded at once."""
        ...

    @property
    def capacity(self) -> int:
        """Most tokens of a request, prompt included."""
        ...

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        ...

    @property
    def waiting(self) -> int:
        """How many requests have been submitted and wait to be decoded."""
        ...

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Compile every program that requests can need."""
        ...

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot run; any thread may ask."""
        ...

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, first come first served; raises UserError for the first that cannot run."""
        ...

    def cancel(self, ids: Collection[int]) -> None:
        """Forget requests, wherever they are; no later step returns them."""
        ...

    def step(self) -> list[Answer]:
        """Decode a few rounds; returns how far requests are, and each that ends once with ``emission.done``."""
        ...


class SlotEngine:
    """A continuous batch of places of one capacity, all of them allocated from the start."""

    def __init__(self, model: Qwen3, policy: Policy, places: int, capacity: int):
        self.places, self.capacity = places, capacity
        self._batch = SlotBatch(model, policy, [Pool(places, capacity)])
        self.check, self.submit, self.cancel = self._batch.check, self._batch.submit, self._batch.cancel

    @property
    def running(self) -> int:
        """How many requests sit in places."""
        return self._batch.running

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return self._batch.waiting

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Compile prefill for every size of prompts, and the rounds."""
        lengths = _prompt_lengths(self.capacity)
        for number, (shortest, longest) in enumerate(lengths, 1):
            say(f"warming up, {number} of {len(lengths)}: prompts of up to {longest} tokens")
            self.submit([Request(-1, [0] * shortest, SamplingParams(max_tokens=1))])
            while self._batch.busy:
                self.step()

    def step(self) -> list[Answer]:
        """Start the next rounds; returns how far requests were when the rounds before had ended."""
        return self._batch.step(ROUNDS_PER_STEP)


def _prompt_lengths(capacity: int) -> list[tuple[int, int]]:
    """The shortest and the longest prompt of every size that prompts are padded to."""
    # The last token of a prompt is not prefilled, so that a prompt of one has none; one token of text needs room.
    lengths, size = [(min(2, capacity - 1), min(SHORT_PROMPT + 1, capacity - 1))], PREFILL_CHUNK
    while lengths[-1][1] < capacity - 1:
        lengths.append((lengths[-1][1] + 1, min(size + 1, capacity - 1)))
        size *= 2
    return lengths
