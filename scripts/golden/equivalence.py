"""Texts that PyTorch samples from a tiny model, and how many drafts its own ISD accepts: for the tests in make test."""

from pathlib import Path

import numpy as np
import torch

from golden.common import VOCAB, generator
from tests.reference.isd import decode, draft_logits
from tests.reference.model import Reference, load_directory
from tests.reference.sampling import Settings, sample

BASE, ADAPTER, MASK = "qwen3_tied", "peft_r8", VOCAB - 1
PROMPT_LENGTHS = (3, 5, 8, 13, 4, 9, 6, 11)
# Plain sampling, and all filters.
SETTINGS = (Settings(0.6), Settings(0.8, 12, 0.9))
STRIDE = 4
DRAWN_TOKENS, DRAWS, ISD_DRAWS = 4, 4096, 1024
TEXT_TOKENS, TEXTS = 32, 64
# The beginning of a greedy text, whose logits are kept.
LOGIT_TOKENS = 16


def write_equivalence(out: Path) -> None:
    """Write `equivalence.npz`; base model and adapter must be in `out` already."""
    reference = Reference(load_directory(out / BASE, "float32", "cpu"), MASK, out / ADAPTER)
    prompts = [torch.randint(0, MASK, (n,), generator=generator(40 + n)).tolist() for n in PROMPT_LENGTHS]
    settings = [SETTINGS[i % 2] for i in range(len(prompts))]
    greedy = [Settings(0.0)] * len(prompts)
    draws = next(sample(reference, prompts, settings, DRAWN_TOKENS, DRAWS, generator(50)))
    texts = next(sample(reference, prompts, settings, TEXT_TOKENS, TEXTS, generator(51)))
    best = next(sample(reference, prompts, greedy, TEXT_TOKENS, 1, generator(52)))
    many = [[each for each in row for _ in range(ISD_DRAWS)] for row in (prompts, settings)]
    isd = decode(reference, *many, STRIDE, DRAWN_TOKENS, generator(53))
    own = decode(reference, prompts, greedy, STRIDE, TEXT_TOKENS, generator(54))
    if not torch.equal(own.tokens, best.tokens[:, 0]):
        raise AssertionError("PyTorch's greedy ISD is not its greedy AR")
    sequence = own.tokens[0, :LOGIT_TOKENS]
    arrays = {
        "sequence": sequence,
        "clean_logits": reference.logits(sequence[None], torch.arange(LOGIT_TOKENS)[None])[0],
        "draft_logits": draft_logits(reference, sequence, STRIDE - 1).flatten(0, 1),
        "prompts": torch.tensor([[MASK] * (max(PROMPT_LENGTHS) - len(prompt)) + prompt for prompt in prompts]),
        "settings": torch.tensor([[each.temperature, each.top_k, each.top_p] for each in settings]),
        "draws": draws.tokens,
        "texts": texts.tokens,
        "greedy": best.tokens[:, 0],
        "isd_accepted": isd.accepted[:, 1].reshape(len(prompts), ISD_DRAWS),
    }
    small = {key: value.numpy() if value.is_floating_point() else value.byte().numpy() for key, value in arrays.items()}
    np.savez_compressed(out / "equivalence.npz", **small)
