"""The PyTorch reference agrees with itself by other routes, and still writes the golden texts; needs torch."""

from functools import cache

import numpy as np
import pytest

from tests.support import GOLDEN

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")

from tests.reference.isd import decode, draft_logits  # noqa: E402
from tests.reference.model import Reference, load_directory  # noqa: E402
from tests.reference.sampling import Filter, Settings, sample  # noqa: E402

pytestmark = pytest.mark.torch

MASK = 95
THEIRS = np.load(GOLDEN / "equivalence.npz")
PROMPTS = [[int(token) for token in row if token != MASK] for row in THEIRS["prompts"]]
GREEDY = [Settings(0.0)] * len(PROMPTS)


@cache
def reference() -> Reference:
    return Reference(load_directory(GOLDEN / "qwen3_tied", "float32", "cpu"), MASK, GOLDEN / "peft_r8")


def seeded(seed: int = 0) -> "torch.Generator":
    return torch.Generator().manual_seed(seed)


def test_greedy_texts_of_the_cache_are_those_of_full_forward_passes_and_the_golden_ones() -> None:
    texts = next(sample(reference(), PROMPTS, GREEDY, 16, 1, seeded())).tokens[:, 0]
    for prompt, text, golden in zip(PROMPTS, texts.tolist(), THEIRS["greedy"], strict=True):
        ids = list(prompt)
        for _ in text:
            logits = reference().logits(torch.tensor([ids]), torch.tensor([[len(ids) - 1]]))[0, 0]
            logits[MASK] = -torch.inf
            ids.append(int(logits.argmax()))
        assert ids[len(prompt) :] == text == golden[:16].tolist()


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_greedy_isd_is_greedy_ar(stride: int) -> None:
    decoded = decode(reference(), PROMPTS, GREEDY, stride, THEIRS["greedy"].shape[1], seeded())
    assert np.array_equal(decoded.tokens.numpy(), THEIRS["greedy"])
    assert int(decoded.accepted.max()) > 0  # some text was drafted


def test_isd_draws_follow_the_distribution_of_ar() -> None:
    count = 2000
    settings = [Settings(*row) for row in THEIRS["settings"].tolist()][:1] * count
    decoded = decode(reference(), PROMPTS[:1] * count, settings, 4, 3, seeded())
    for depth in range(3):
        ours, theirs = (np.bincount(x[:, depth], minlength=96) / len(x) for x in (decoded.tokens, THEIRS["draws"][0]))
        noise = np.sqrt((ours + theirs) / 2 * (1 / count + 1 / len(THEIRS["draws"][0])))
        assert np.abs(ours - theirs).max() < 5 * noise.max()
        assert np.abs(ours - theirs).sum() < 1.3 * np.sqrt(2 / np.pi) * noise.sum()


def test_filters_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]))
    rows = {
        Settings(1.0, 0, 1.0): [0.5, 0.375, 0.0, 0.125],  # token 2 is the mask
        Settings(0.5, 0, 1.0): [16 / 26, 9 / 26, 0.0, 1 / 26],
        Settings(1.0, 2, 1.0): [4 / 7, 3 / 7, 0.0, 0.0],
        Settings(1.0, 0, 0.51): [4 / 7, 3 / 7, 0.0, 0.0],
        Settings(1.0, 0, 0.49): [1.0, 0.0, 0.0, 0.0],
        Settings(0.0, 0, 1.0): [1.0, 0.0, 0.0, 0.0],
    }
    settings = list(rows)
    p = Filter(settings, 2, torch.device("cpu")).probabilities(logits.expand(len(settings), 1, 4))
    np.testing.assert_allclose(p[:, 0].numpy(), list(rows.values()), atol=1e-6)


def test_the_adapter_acts_on_gated_rows_alone() -> None:
    text = torch.tensor(THEIRS["sequence"].astype(np.int64))
    rows, bare = torch.arange(len(text))[None], Reference(load_directory(GOLDEN / "qwen3_tied", "float32", "cpu"), MASK)
    assert torch.equal(reference().logits(text[None], rows), bare.logits(text[None], rows))
    adapted, plain = (draft_logits(each, text, 3) for each in (reference(), bare))
    assert float((adapted - plain).abs().max()) > 0.5
    assert np.abs(adapted.flatten(0, 1).numpy() - THEIRS["draft_logits"]).max() < 1e-4
