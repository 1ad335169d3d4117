"""SmolLM2 beside transformers on one GPU: logits in float32 and bfloat16, and greedy texts of AR and ISD.

Run by hand on a machine with a GPU, torch and transformers::

    python scripts/compare_transformers.py models/SmolLM2-135M-Instruct.Q4_1.gguf

transformers reads and de-quantises the GGUF file by itself; nothing but the file and the token ids of the prompts is
shared. For every text that differs from transformers' greedy text, the gap between the two best logits of transformers
at the first difference is printed: a near tie that rounding may flip, or else a fault.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table

import idlm_jax
from idlm_jax.backbone.qwen3 import causal_logits
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.evaluation.equivalence import first_difference

DECODERS = {
    "AR": DecodeConfig(stride=1),
    "ISD N=4 standard": DecodeConfig(stride=4, layout="standard"),
    "ISD N=4 branch": DecodeConfig(stride=4, layout="branch"),
    "ISD N=8 standard": DecodeConfig(stride=8, layout="standard"),
}


@dataclass(frozen=True)
class Settings:
    """What to compare."""

    gguf: tyro.conf.Positional[Path]
    # One prompt a line; each becomes a chat.
    prompts: Path = Path("scripts/prompts.txt")
    max_tokens: int = 128
    batch: int = 64
    device: str = "cuda"
    # Only the first so many prompts.
    limit: int | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    # Which of our decoders; names of DECODERS, none for logits alone.
    decoders: tuple[str, ...] = tuple(DECODERS)


def greedy_texts(model: Any, prompts: list[list[int]], settings: Settings, end: int) -> list[list[int]]:
    """transformers' greedy continuations, one prompt at a time, so that no padding is involved."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=settings.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.max_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def logit_rows(model: Any, ids: list[int], device: str) -> np.ndarray:
    """transformers' logits of every position of one sequence, float32."""
    with torch.no_grad():
        return model(torch.tensor([ids], device=device)).logits[0].float().cpu().numpy()


def our_logit_rows(model: idlm_jax.LanguageModel, ids: list[int]) -> np.ndarray:
    """Ours; padded on the right to a multiple of 64, so that few programs are compiled."""
    padded = ids + [0] * (-len(ids) % 64)
    return np.asarray(_causal_logits(model.model, jnp.asarray([padded])))[0, : len(ids)]


_causal_logits = jax.jit(causal_logits)


def describe(ours: list[np.ndarray], theirs: list[np.ndarray]) -> str:
    """Largest and mean absolute error over all positions, the logits' scale, and how often the argmax agrees."""
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(float(np.abs(a - b).max()) for a, b in pairs)
    mean = np.mean(np.concatenate([np.abs(a - b).mean(-1) for a, b in pairs]))
    agreement = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    return (
        f"max error {largest:.3e}, mean {mean:.3e}, scale {np.concatenate(theirs).std():.3f}, "
        f"argmax agreement {agreement.mean():.5f} over {len(agreement)} positions"
    )


def our_texts(
    model: idlm_jax.LanguageModel, prompts: list[list[int]], decode: DecodeConfig, settings: Settings
) -> list:
    """Our greedy continuations with their statistics, in batches."""
    sampling = idlm_jax.SamplingParams(max_tokens=settings.max_tokens)
    batches = [prompts[i : i + settings.batch] for i in range(0, len(prompts), settings.batch)]
    return [generation for batch in batches for generation in model.generate(batch, sampling, decode)]


def compare_texts(
    console: Console, name: str, generations: list, theirs: list[list[int]], gaps: list[np.ndarray]
) -> list[str]:
    """One row of the table of texts; prints every first difference with transformers' logit gap there."""
    tokens = sum(g.stats.tokens for g in generations)
    forwards = sum(g.stats.forwards for g in generations)
    differing = []
    for i, (generation, reference) in enumerate(zip(generations, theirs, strict=True)):
        at = first_difference(generation.token_ids, reference)
        if at is not None:
            differing.append(float(gaps[i][at]))
            console.print(f"  {name}: prompt {i} differs at token {at}, logit gap {gaps[i][at]:.5f}")
    same = len(theirs) - len(differing)
    return [name, f"{same}/{len(theirs)}", f"{max(differing, default=0):.5f}", f"{tokens / forwards:.3f}"]


@dataclass(frozen=True)
class Reference:
    """Sequences (prompt and transformers' greedy text) and transformers' logits on them, of the first dtype."""

    dtype: str
    sequences: list[list[int]]
    rows: list[np.ndarray]


def load_transformers(settings: Settings, dtype: str) -> Any:
    """The PyTorch model, read from the GGUF file by transformers itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.gguf.parent, gguf_file=settings.gguf.name, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return model.to(settings.device).eval()


def run(settings: Settings, dtype: str, reference: Reference | None, console: Console) -> Reference:
    """All comparisons in one dtype."""
    theirs = load_transformers(settings, dtype)
    ours = idlm_jax.load(settings.gguf, dtype=dtype, mask_token=16)
    lines = settings.prompts.read_text().splitlines()[: settings.limit]
    prompts = [ours.encode([{"role": "user", "content": line}]) for line in lines]
    texts = greedy_texts(theirs, prompts, settings, ours.config.eos_token_ids[0])
    own = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    sequences = reference.sequences if reference else own
    their_rows = [logit_rows(theirs, ids, settings.device) for ids in sequences]
    our_rows = [our_logit_rows(ours, ids) for ids in sequences]
    console.print(f"{dtype} logits, ours against transformers' {dtype}: {describe(our_rows, their_rows)}")
    if reference:
        against = f"against transformers' {reference.dtype}"
        console.print(f"{dtype} logits, ours {against}: {describe(our_rows, reference.rows)}")
        console.print(f"{dtype} logits, transformers' own {against}: {describe(their_rows, reference.rows)}")
    gaps = []
    for prompt, ids in zip(prompts, own, strict=True):
        best = np.partition(logit_rows(theirs, ids, settings.device)[len(prompt) - 1 :], -2, axis=-1)[:, -2:]
        gaps.append(best[:, 1] - best[:, 0])
    table = Table("decoder", "same text", "largest gap at a first difference", "TPF", title=f"greedy texts, {dtype}")
    for name in settings.decoders:
        generations = our_texts(ours, prompts, DECODERS[name], settings)
        table.add_row(*compare_texts(console, name, generations, texts, gaps))
    console.print(table)
    return reference or Reference(dtype, sequences, their_rows)


def main(settings: Settings) -> None:
    """Compare in each dtype, logits on the sequences of the first."""
    console = Console(width=120, soft_wrap=True)
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    console.print(f"{jax.devices()[0].device_kind}, {versions}")
    reference = None
    for dtype in settings.dtypes:
        reference = run(settings, dtype, reference, console)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
