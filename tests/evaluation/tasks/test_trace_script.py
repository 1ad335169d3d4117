"""``scripts/trace_texts.py``: where an answer leaves AR's, and what the logits there are."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import idlm_jax
from idlm_jax.backbone.qwen3 import causal_logits
from idlm_jax.decoding.generate import SamplingParams
from tests.cli.decoding_support import TINY

ROOT = Path(__file__).parents[3]
PROMPT = list(range(5, 17))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("trace_texts")


def test_gap_is_between_the_tokens_at_the_first_difference(script: Any) -> None:
    model = idlm_jax.load(TINY, dtype="float32")
    text = model.generate(PROMPT, SamplingParams(max_tokens=6), stride=1)[0].token_ids
    logits = np.asarray(causal_logits(model.model, jnp.array([PROMPT + text[:3]])))[0, -1]
    ranked = np.argsort(-logits).tolist()
    assert ranked[0] == text[3]

    def traced(token: int) -> Any:
        other = [*text[:3], token, 7, 8]
        return script.trace(model, PROMPT, {"id": "q", "token_ids": text}, {"id": "q", "token_ids": other}, True)

    assert traced(text[3]).token == 4
    second, third = traced(ranked[1]), traced(ranked[2])
    assert (second.token, second.best_two, third.best_two) == (3, True, False)
    assert second.gap == pytest.approx(logits[ranked[0]] - logits[ranked[1]], rel=1e-4)
    assert third.gap == pytest.approx(logits[ranked[0]] - logits[ranked[2]], rel=1e-4)
    assert second.spread == pytest.approx(logits.std(), rel=1e-4)
    assert script.trace(model, PROMPT, {"token_ids": text}, {"token_ids": text}, True) is None


def test_greedy_cells_are_traced_against_the_mode_they_repeat(script: Any, tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for mode in ("ar", "r-isd", "isd", "adapted-ar"):
        for temperature in (0, 1):
            cell = {"task": "gsm8k", "mode": mode, "temperature": temperature, "adapter": "x"}
            lines = [{"id": i, "token_ids": [mode]} for i in ("a", "b")]
            (samples / f"gsm8k_{mode}_t{temperature}.json").write_text(json.dumps(cell))
            (samples / f"gsm8k_{mode}_t{temperature}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = {cell["mode"]: theirs[0]["token_ids"] for cell, theirs, _ in script.cells(tmp_path)}
    assert found == {"r-isd": ["ar"], "isd": ["adapted-ar"]}
