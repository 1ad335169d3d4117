"""What the tests of generate, chat and demo share: a tiny model, and answers by script instead of compiled programs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idlm_jax.checkpoint.open import open_source
from idlm_jax.cli import main as cli
from idlm_jax.cli import render
from idlm_jax.decoding.generate import Emission, SamplingParams, check_request
from idlm_jax.decoding.step import Policy
from tests.support import GOLDEN

TINY = GOLDEN / "gguf" / "qwen3_f32.gguf"
END = 2
TOKENIZER = open_source(TINY).tokenizer()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command line inside this process: exit code, output, messages."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command is refused."""
    with pytest.MonkeyPatch.context() as patch:
        # A slow machine would say what it is doing before it refuses.
        patch.setattr(render, "_QUIET_SECONDS", 600.0)
        code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("idlm: error: ") and err.count("\n") == 1, err
    return err


@dataclass
class Script:
    """Stands in for Decoding: every request says ``text``, some tokens a round, and what was asked for is kept."""

    text: str = "hello 12 and hello"
    # At most the stride; 1 is a model whose drafts are never right.
    tokens_a_round: int = 3
    prompts: list[str] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)
    policies: list[Policy] = field(default_factory=list)
    # Raised, once, when the second call of ``run`` comes.
    interrupt: type[BaseException] | None = None
    most_rounds: int = 2

    def __call__(
        self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], policy: Policy
    ) -> "Scripted":
        for prompt, params in zip(prompts, sampling, strict=True):
            check_request(model, prompt, params, policy)
        self.prompts += [TOKENIZER.decode(prompt) for prompt in prompts]
        self.sampling += sampling
        self.policies.append(policy)
        return Scripted(self, sampling, policy.stride)


class Scripted:
    """One batch of a Script."""

    seconds, start_seconds = 0.5, 0.25

    def __init__(self, script: Script, sampling: Sequence[SamplingParams], stride: int):
        self._script, self._stride, self._rounds = script, stride, 0
        ids = [*TOKENIZER(script.text).input_ids, END]
        self._texts = [ids[: params.max_tokens] for params in sampling]

    def run(self, rounds: int) -> list[Emission]:
        if self._rounds and self._script.interrupt:
            interrupt, self._script.interrupt = self._script.interrupt, None
            raise interrupt
        self._rounds += min(rounds, self._script.most_rounds)
        return [self._emission(text) for text in self._texts]

    def _emission(self, text: list[int]) -> Emission:
        each = min(self._stride, self._script.tokens_a_round)
        history = [-1] + [each - 1] * (self._rounds - 1) if self._stride > 1 else [0] * self._rounds
        emitted = np.array(text[: sum(max(outcome, 0) + 1 for outcome in history)])
        needed = 1 + -(-(len(emitted) - 1) // each)
        return Emission(emitted, np.array(history[:needed]), len(emitted) == len(text))

    def end(self, requests: Sequence[int]) -> None:
        """Nothing to stop."""


def json_lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
