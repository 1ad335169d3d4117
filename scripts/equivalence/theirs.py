"""PyTorch's side, a process of its own: ``python -m scripts.equivalence.theirs FOLDER``. Imports nothing of ours."""

import json
import math
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

os.environ.setdefault("TQDM_DISABLE", "1")  # a line for every tensor of a GGUF file
import torch
import transformers

from scripts.equivalence.plan import DTYPES, Clock, Plan
from tests.reference.isd import decode, draft_logits
from tests.reference.model import Reference, load_directory, load_gguf
from tests.reference.sampling import Sampled, Settings, sample

# Requests of one forward pass without a cache.
BATCH = 256


def main(folder: Path) -> None:
    """Write PyTorch's logits, texts and draws into the folder."""
    torch.backends.cuda.matmul.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plan, clock = Plan.load(folder), Clock("PyTorch", {})
    with clock.part("the real model"):
        write_greedy(plan, folder)
    reference = Reference(load_gguf(Path(plan.gguf), "float32", plan.device), plan.mask_token, Path(plan.adapter))
    if "draws" in plan.parts:
        with clock.part("draws"):
            write_draws(reference, plan, folder)
    if "texts" in plan.parts:
        with clock.part("texts"):
            write_texts(reference, plan, folder)
    del reference
    if "logits" in plan.parts:
        for name, shape in (plan.shapes or {}).items():
            with clock.part(f"logits, {name}"):
                write_random_model(shape, folder / name, plan.device)
                for dtype in DTYPES:
                    model = load_directory(folder / name, dtype, plan.device)
                    tokens = np.random.default_rng(0).integers(0, 100_000, (plan.logit_rows, plan.logit_tokens))
                    write_logits(Reference(model, shape["vocab_size"] - 1), tokens, plan, folder / f"{name}-{dtype}")
                    del model
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else plan.device
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "device": gpu}
    (folder / "theirs.json").write_text(json.dumps({"seconds": clock.seconds, "versions": versions}))


def write_greedy(plan: Plan, folder: Path) -> None:
    """Greedy texts with their logit gaps, the logits on them, and the prefixes: prompts, and prompts with an answer."""
    for dtype in DTYPES if {"greedy", "logits"} & set(plan.parts) else DTYPES[:1]:
        reference = Reference(load_gguf(Path(plan.gguf), dtype, plan.device), plan.mask_token, Path(plan.adapter))
        settings = [Settings(0.0)] * len(plan.prompts)
        drawn = _draws(reference, plan.prompts, settings, plan.greedy_tokens, 1, 1, seed=0)
        texts = drawn.tokens[:, 0].cpu().numpy()
        np.savez(folder / f"greedy-{dtype}.npz", texts=texts, gaps=drawn.gaps[:, 0].cpu().numpy())
        if dtype == DTYPES[0]:
            answers = [prompt + _answer(text, plan) for prompt, text in zip(plan.prompts, texts, strict=True)]
            prefixes = [prefix for pair in zip(plan.prompts, answers, strict=True) for prefix in pair]
            (folder / "prefixes.json").write_text(json.dumps(prefixes))
            whole = [prompt + text.tolist() for prompt, text in zip(plan.prompts, texts, strict=True)]
            tokens = np.array([ids[: plan.logit_tokens] for ids in whole[: plan.logit_rows]])
        if "logits" in plan.parts:
            write_logits(reference, tokens, plan, folder / f"real-{dtype}")


def _answer(text: np.ndarray, plan: Plan) -> list[int]:
    """The beginning of an answer, never its end."""
    (ends,) = np.nonzero(text == plan.end_token)
    length = min(plan.answer_tokens, ends[0] // 2 if len(ends) else len(text))
    return text[:length].tolist()


def write_draws(reference: Reference, plan: Plan, folder: Path) -> None:
    """Short texts by AR, by AR again as a control, and by ISD with the number of drafts accepted in its rounds."""
    prefixes, settings = _prefixes(plan, folder)
    drawn = {}
    for seed, (name, count) in enumerate({"reference": plan.reference_draws, "control": plan.draws}.items()):
        copies = min(4 * plan.copies, count)
        result = _draws(reference, prefixes, settings, plan.drawn_tokens, count, copies, seed)
        drawn[name] = result.tokens.cpu().numpy().astype(np.int32)
    generator = torch.Generator(plan.device).manual_seed(1000)
    texts, accepted = [], []
    many = [(p, s) for p, s in zip(prefixes, settings, strict=True) for _ in range(plan.isd_draws)]
    for first in range(0, len(many), BATCH):
        batch = zip(*many[first : first + BATCH], strict=True)
        decoded = decode(reference, *batch, plan.stride, plan.drawn_tokens, generator)
        texts.append(decoded.tokens.cpu().numpy())
        accepted.append(decoded.accepted[:, 1].cpu().numpy())
    drawn["isd"] = np.concatenate(texts).reshape(len(prefixes), plan.isd_draws, -1).astype(np.int32)
    drawn["isd_accepted"] = np.concatenate(accepted).reshape(len(prefixes), plan.isd_draws)
    np.savez(folder / "draws-theirs.npz", **drawn)


def write_texts(reference: Reference, plan: Plan, folder: Path) -> None:
    """Long texts by AR, and again as a control."""
    prefixes, settings = _prefixes(plan, folder)
    texts = {}
    for seed, name in enumerate(("reference", "control")):
        copies = min(2 * plan.copies, plan.texts)
        drawn = _draws(reference, prefixes, settings, plan.text_tokens, plan.texts, copies, 100 + seed)
        texts[name] = drawn.tokens.cpu().numpy().astype(np.int32)
    np.savez(folder / "texts-theirs.npz", **texts)


def _prefixes(plan: Plan, folder: Path) -> tuple[list[list[int]], list[Settings]]:
    prefixes = json.loads((folder / "prefixes.json").read_text())
    return prefixes, [Settings(**each) for each in plan.settings(len(prefixes))]


def _draws(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    length: int,
    count: int,
    copies: int,
    seed: int,
) -> Sampled:
    generator = torch.Generator(reference.device).manual_seed(seed)
    batches = sample(reference, prompts, settings, length, copies, generator)
    parts = list(islice(batches, math.ceil(count / copies)))
    tokens, gaps = (torch.cat([getattr(part, name) for part in parts], dim=1)[:, :count] for name in ("tokens", "gaps"))
    return Sampled(tokens, gaps)


@torch.no_grad()
def write_random_model(shape: dict, directory: Path, device: str) -> None:
    """A checkpoint of this shape: every weight random, norms far from one, logits of a spread of about one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape))
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    model.save_pretrained(directory)


def write_logits(reference: Reference, tokens: np.ndarray, plan: Plan, folder: Path) -> None:
    """Logits of every position, those of the masks appended after it, and the outputs of every layer."""
    folder.mkdir()
    ids = torch.tensor(tokens, device=plan.device)
    everywhere = torch.arange(ids.shape[1], device=plan.device).expand(ids.shape)
    clean = torch.cat([reference.logits(one[None], rows[None]) for one, rows in zip(ids, everywhere, strict=True)])
    np.save(folder / "clean.npy", clean.cpu().numpy())
    layers = torch.stack(reference.layer_outputs(ids))
    np.save(folder / "layers.npy", layers.cpu().numpy())
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    masks = torch.stack([draft_logits(reference, one, plan.stride - 1).cpu() for one in ids])
    np.save(folder / "masks.npy", masks.flatten(1, 2).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
