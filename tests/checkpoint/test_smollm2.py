"""The real SmolLM2-135M-Instruct: ids, logits and greedy tokens of PyTorch (skipped until ``idlm fetch`` got it)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.checkpoint.fetch import MODELS
from idlm_jax.checkpoint.gguf import GGUFSource
from idlm_jax.checkpoint.open import load_params
from tests.support import GOLDEN

FILE = Path(__file__).parents[2] / "models" / MODELS["smollm2"].file_name
CASES = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))
PROMPTS = [*CASES["prompts"], CASES["chat"]]
# A greedy choice closer than this to the runner-up may fall either way in another order of summation.
NEAR_TIE = 2e-3

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"needs models/{FILE.name}: run `idlm fetch smollm2`")


@pytest.fixture(scope="module")
def source() -> GGUFSource:
    return GGUFSource(FILE)


@pytest.fixture(scope="module")
def logits(source: GGUFSource) -> list[np.ndarray]:
    """Logits of each prompt with its golden continuation, [length, V]."""
    model = Qwen3(source.config, load_params(source, jnp.float32))
    rows = [prompt["ids"] + prompt["continuation"]["ids"] for prompt in PROMPTS]
    longest = max(map(len, rows))
    padded = jnp.asarray([row + [0] * (longest - len(row)) for row in rows])
    apply = jax.jit(causal_logits)
    return [np.asarray(apply(model, padded[i : i + 1]))[0, : len(row)] for i, row in enumerate(rows)]


def test_the_golden_file_is_of_the_model_that_fetch_gets() -> None:
    assert CASES["sha256"] == MODELS["smollm2"].sha256


def test_token_ids_equal_the_golden_ones(source: GGUFSource) -> None:
    tokenizer = source.tokenizer()
    for row in [*PROMPTS, *CASES["texts"]]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"]
    chat = CASES["chat"]
    assert tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True) == chat["text"]
    for prompt in PROMPTS:
        assert tokenizer.decode(prompt["continuation"]["ids"]) == prompt["continuation"]["text"]


def test_logits_equal_those_of_pytorch(logits: list[np.ndarray]) -> None:
    golden = load_file(GOLDEN / "smollm2.safetensors")
    for i, prompt in enumerate(PROMPTS):
        row = logits[i][len(prompt["ids"]) - 1].astype(np.float64)
        np.testing.assert_allclose(row[golden["top_ids"][i]], golden["top_logits"][i], atol=2e-4 * row.std())
        assert abs(np.logaddexp.reduce(row) - golden["logsumexp"][i]) < 2e-4 * row.std()
        assert set(np.argsort(row)[-32:]) <= set(golden["top_ids"][i])


def test_greedy_tokens_equal_those_of_pytorch(logits: list[np.ndarray]) -> None:
    for rows, prompt in zip(logits, PROMPTS, strict=True):
        wanted = np.array(prompt["continuation"]["ids"])
        chosen = rows[len(prompt["ids"]) - 1 : -1].argmax(axis=-1)
        differs = chosen != wanted
        assert not differs.any() or max(np.array(prompt["continuation"]["top2_gap"])[differs]) < NEAR_TIE
        assert differs.mean() < 0.1


def test_the_mask_token_is_one_that_text_never_contains(source: GGUFSource) -> None:
    tokenizer, token_id = source.tokenizer(), MODELS["smollm2"].mask_token_id
    assert tokenizer.convert_ids_to_tokens(token_id) == "<empty_output>"
    assert all(token_id not in prompt["continuation"]["ids"] for prompt in PROMPTS)
