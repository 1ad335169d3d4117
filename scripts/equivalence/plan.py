"""What both sides of the comparison are asked to do: numbers, token ids and file names, nothing of either library."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PARTS = ("logits", "draws", "texts", "greedy")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Plan:
    """One run; written to the working folder by the script and read by each side."""

    gguf: str
    # Directory of a PEFT adapter; it acts on mask rows only.
    adapter: str
    mask_token: int
    end_token: int
    # Chats as token ids, ready for the answer.
    prompts: list[list[int]]
    parts: tuple[str, ...] = PARTS
    # Shapes with random weights, Hugging Face config.json keys by name; the real model always takes part.
    shapes: dict[str, dict[str, Any]] | None = None
    stride: int = 4
    # Half of the prefixes are prompts, the other half the same with the first tokens of the greedy answer.
    answer_tokens: int = 24
    # Short texts: drawn_tokens each, the first from a cold round, the others from drafts and their verification.
    drawn_tokens: int = 4
    # For every prefix: our draws in each way, PyTorch's, and those of PyTorch's ISD.
    draws: int = 400
    reference_draws: int = 1600
    isd_draws: int = 25
    # For every prefix: long texts of each writer.
    texts: int = 40
    text_tokens: int = 64
    greedy_tokens: int = 128
    # Requests decoded at once for every prefix.
    copies: int = 8
    # Sequences whose logits are compared, and their tokens (a multiple of the stride).
    logit_rows: int = 2
    logit_tokens: int = 96
    device: str = "cuda"

    def save(self, folder: Path) -> None:
        """Write plan.json."""
        (folder / "plan.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read it back."""
        data = json.loads((folder / "plan.json").read_text())
        return cls(**{**data, "parts": tuple(data["parts"])})

    def settings(self, prefixes: int) -> list[dict[str, Any]]:
        """How each prefix is sampled: plainly, and every second pair with all filters."""
        plain, filtered = ({"temperature": 1.0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95})
        return [filtered if i // 2 % 2 else plain for i in range(prefixes)]


@dataclass(frozen=True)
class Clock:
    """Seconds of the parts of one side."""

    side: str
    seconds: dict[str, float]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part and say how long it took."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{self.side}: {name}, {self.seconds[name]} s", flush=True)
