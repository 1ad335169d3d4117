"""Training fixtures: logits, losses and gradients of the official dense `[x_t | x_0]` forward (golden/dense.py).

Everything is computed in float64 and stored rounded to float32; scalars are in `training.json` as float64. All of it
is checked here against transformers' own layers in float32. Written to tests/golden/training:

`qwen3_tied.safetensors`, `qwen3_untied.safetensors`: the checkpoints of those names, mask token 95. L = 23 is no
multiple of 2, 3 or 7, and the prompts (5 and 11 tokens) end inside a block for each of these.
  tokens, labels                       [2, L]      the sample x_0 and its labels, -100 on the prompt
  b{B}/logits                          [2, 2L, V]  block size B = 1, 2, 3, 7; the noisy half first
  b{B}/grad_{loss}/{parameter}                     shape and HF name of the parameter; `ce_noisy`; `loss_fixed` =
                                                   CE_noisy + 0.2 · CE_clean; `loss_auto`: the balanced sum

`packed.safetensors` (qwen3_tied, B = 3): two documents of 10 and 13 tokens, run as `[t1|c1|t2|c2]`.
  tokens, labels, segments, positions  [1, 23]     the packed clean row; segments 0 and 1, positions restart
  doc{n}/logits                        [2·L_n, V]  noisy half, then clean half, of each document
  grad_loss_fixed/{parameter}                      documents count as samples: mean CE_noisy, one mean of CE_clean

`lora.safetensors` (qwen3_tied, B = 3, the tokens and labels above): the adapter in `adapter/`, PEFT's format plus
`mask_embedding.safetensors`; rank 4, alpha 8. Mask tokens of the noisy half are embedded as `mask_embedding`.
  gated/…                                          adapter on the mask rows of the noisy half only, as in decoding
  gated_half/…                                     adapter on the whole noisy half, its real prompt tokens included
  ungated/…                                        adapter on both halves
    logits                             [2, 2L, V]
    grad_{loss}/layers.0.{module}.lora_A           [R, in]; lora_B [out, R]; of `ce_noisy` and `loss_fixed`
    grad_{loss}/mask_embedding         [D]

`soft.safetensors`: losses between rows of 40 random logits p (verifier) and q (drafter).
  p_logits, q_logits                   [40, V]
  tokens                               [40]        drawn from q
  kl, tv, accept                       [40]        KL(p || q) in nats; 0.5 Σ|p - q|; Σ min(p, q) = 1 - tv
  token_accept                         [40]        min(1, p/q) of the token
  argmax_equal                         [40]        bool
  grad_mean_kl, grad_mean_tv           [40, V]     with respect to q_logits

`training.json`: the settings, and by file and case the terms of the loss. A name with `_per_sample` lists the
samples, each with a loss of its own; the official trainer's value is the mean of that list (one sample a device).
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from golden.common import VOCAB, generator, load, write_json, write_tensors
from golden.dense import (
    IGNORED,
    Layout,
    Lora,
    Losses,
    combine,
    embed,
    forward,
    layout_of,
    losses,
    noise,
    official_mask,
)
from golden.peft_cases import ATTENTION, MLP, randomise_adapter

LENGTH, PROMPTS, BLOCKS = 23, (5, 11), (1, 2, 3, 7)
MASK = VOCAB - 1
ALPHA = 0.2
PACKED_LENGTHS, PACKED_PROMPTS, PACKED_BLOCK = (10, 13), (4, 5), 3
BASE, LORA_BLOCK, RANK, LORA_ALPHA = "qwen3_tied", 3, 4, 8
SOFT_ROWS = 40
PARAMETERS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_norm.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
)
TOLERANCE = 1e-5  # of logits of std 1: transformers in float32 against float64
GRADIENT_TOLERANCE = 1e-5  # of the largest entry of the gradient
MIN_EFFECT = 0.1  # where the adapter acts must change the logits at least this far

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One tiny model in both arithmetics."""

    model: PreTrainedModel  # transformers' own, float32: what the oracle is checked against
    weights: Tensors  # the same parameters in float64, leaves of the gradient


@dataclass(frozen=True)
class Input:
    """One batch of `[x_t | x_0]` rows."""

    tokens: torch.Tensor  # [B, S]
    layout: Layout  # of the S rows
    visible: torch.Tensor  # bool [S, S]

    @property
    def is_mask(self) -> torch.Tensor:
        """Bool [B, S]: mask tokens; clean halves hold none."""
        return self.tokens == MASK


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder that the part `hf` wrote."""
    model = load(folder)
    return Checkpoint(model, {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()})


def make_sample(length: int, prompt: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random real tokens [L] and their labels [L], ignored on the prompt."""
    tokens = torch.randint(0, MASK, (length,), generator=generator(seed))
    return tokens, torch.where(torch.arange(length) < prompt, IGNORED, tokens)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [2, L] that the cases of one document a row share."""
    samples = [make_sample(LENGTH, prompt, seed=40 + i) for i, prompt in enumerate(PROMPTS)]
    return torch.stack([t for t, _ in samples]), torch.stack([y for _, y in samples])


def make_input(documents: list[tuple[torch.Tensor, torch.Tensor]], block: int) -> Input:
    """Join documents, each (tokens [B, L_n], labels [B, L_n]), to `[t1|c1|t2|c2|…]` under the official mask."""
    layout = layout_of([tokens.shape[1] for tokens, _ in documents])
    halves = [half for tokens, labels in documents for half in (noise(tokens, labels, MASK), tokens)]
    return Input(torch.cat(halves, dim=1), layout, official_mask(layout, block))


def run(
    checkpoint: Checkpoint, batch: Input, lora: Lora | None = None, mask_embedding: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [B, S, V] in float64."""
    embeddings = embed(checkpoint.weights, batch.tokens, mask_embedding, batch.is_mask)
    config = checkpoint.model.config
    return forward(checkpoint.weights, config, embeddings, batch.layout.positions, batch.visible, lora)


def objectives(terms: Losses) -> Tensors:
    """The three losses of a batch, by the name their gradients get."""
    return {
        "ce_noisy": terms.noisy,
        "loss_fixed": combine(terms.noisy, terms.clean, ALPHA),
        "loss_auto": combine(terms.noisy, terms.clean, None),
    }


def scalars(terms: Losses) -> dict[str, Any]:
    """Every term and loss, of the batch and of each sample, for the JSON file."""
    noisy, clean = terms.noisy_per_sample, terms.clean_per_sample
    values = objectives(terms) | {
        "ce_clean": terms.clean,
        "ce_noisy_per_sample": noisy,
        "ce_clean_per_sample": clean,
        "loss_fixed_per_sample": combine(noisy, clean, ALPHA),
        "loss_auto_per_sample": combine(noisy, clean, None),
    }
    return {name: value.tolist() for name, value in values.items()}


def gradients(wanted: Tensors, parameters: Tensors) -> Tensors:
    """`grad_{loss}/{parameter}` of every loss with respect to every parameter."""
    result = {}
    for name, loss in wanted.items():
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        result |= {f"grad_{name}/{p}": g for p, g in zip(parameters, grads, strict=True)}
    return result


def rounded(tensors: Tensors, prefix: str = "") -> Tensors:
    """Float64 as it is stored: float32."""
    return {prefix + n: t.detach().float() if t.dtype == torch.float64 else t for n, t in tensors.items()}


# The checks: transformers' own layers must give the same.


@contextmanager
def adapted(model: PreTrainedModel, lora: Lora | None) -> Iterator[None]:
    """Add the gated adapter to the Linears of a transformers model."""
    handles = []
    for name, (a, b) in lora.matrices.items() if lora else ():
        a, b, gate = a.detach().float(), b.detach().float(), lora.gate[..., None]

        def add(module: Any, args: Any, y: torch.Tensor, a: Any = a, b: Any = b, gate: Any = gate) -> torch.Tensor:
            return y + gate * (lora.scale * args[0] @ a.T @ b.T)

        handles.append(model.get_submodule(name).register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


def hf_logits(
    model: torch.nn.Module,
    batch: Input,
    lora: Lora | None = None,
    mask_embedding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [B, S, V] of transformers' model, in float32, under the same mask given as a 4D additive one."""
    rows = model.get_input_embeddings()(batch.tokens)
    if mask_embedding is not None:
        rows = torch.where(batch.is_mask[..., None], mask_embedding.detach().float(), rows)
    additive = torch.zeros(batch.visible.shape).masked_fill(~batch.visible, torch.finfo(torch.float32).min)
    with adapted(model, lora):
        return model(
            inputs_embeds=rows,
            attention_mask=additive.expand(len(rows), 1, -1, -1),
            position_ids=batch.layout.positions.expand(len(rows), -1),
            use_cache=False,
        ).logits


def require_close(what: str, value: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """Raise when the largest difference exceeds the tolerance."""
    error = (value.double() - reference.double()).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: differs by {error:.2e} from transformers")


def check_clean(what: str, model: PreTrainedModel, tokens: torch.Tensor, clean_logits: torch.Tensor) -> None:
    """The clean half is the AR model: its plain causal forward of x_0."""
    with torch.no_grad():
        require_close(f"{what}, clean half", clean_logits, model(input_ids=tokens).logits, TOLERANCE)


@torch.no_grad()
def check_like_decoding(
    what: str,
    model: PreTrainedModel,
    sample: tuple[torch.Tensor, torch.Tensor],
    block: int,
    noisy_logits: torch.Tensor,
    lora: Lora | None = None,
    mask_embedding: torch.Tensor | None = None,
) -> None:
    """Mask rows of one sample's block [L, V] equal a causal forward of the real tokens before them and the masks.

    In the block on the prompt's border the masks begin after the prompt, whose noisy rows equal clean ones.
    """
    tokens, labels = sample
    prompt = int((labels == IGNORED).sum())
    for first in range(0, len(tokens), block):
        start, end = max(first, prompt), min(first + block, len(tokens))
        if start >= end:
            continue
        window = torch.cat([tokens[:start], torch.full((end - start,), MASK)])[None]
        layout = Layout(window[0] == MASK, torch.zeros(end, dtype=torch.long), torch.arange(end))
        causal = torch.ones(end, end).tril().bool()
        gated = replace(lora, gate=window == MASK) if lora else None
        logits = hf_logits(model, Input(window, layout, causal), gated, mask_embedding)
        require_close(f"{what}, block at {first}", noisy_logits[start:end], logits[0, start:], TOLERANCE)


def check_gradients(what: str, ours: Tensors, reference: Tensors) -> None:
    """Each gradient, against its own largest entry."""
    for name, gradient in ours.items():
        require_close(f"{what}, {name}", gradient, reference[name], GRADIENT_TOLERANCE * gradient.abs().max().item())


# The files.


def write_model(name: str, out: Path, folder: Path) -> dict[str, Any]:
    """Write the cases of one checkpoint, one document a row; return their scalars."""
    checkpoint, (tokens, labels) = open_checkpoint(out / name), make_batch()
    names = PARAMETERS if checkpoint.model.config.tie_word_embeddings else (*PARAMETERS, "lm_head.weight")
    stored, values = {"tokens": tokens, "labels": labels}, {}
    for block in BLOCKS:
        what, batch = f"{name}, B = {block}", make_input([(tokens, labels)], block)
        logits, theirs = run(checkpoint, batch), hf_logits(checkpoint.model, batch)
        terms = losses(logits[:, :LENGTH], logits[:, LENGTH:], labels)
        grads = gradients(objectives(terms), {n: checkpoint.weights[n] for n in names})

        require_close(what, logits, theirs, TOLERANCE)
        check_clean(what, checkpoint.model, tokens, logits[:, LENGTH:])
        for i in range(len(tokens)):
            check_like_decoding(what, checkpoint.model, (tokens[i], labels[i]), block, logits[i, :LENGTH])
            require_close(what, logits[i, : PROMPTS[i]], theirs[i, LENGTH : LENGTH + PROMPTS[i]], TOLERANCE)
        their_terms = losses(theirs[:, :LENGTH], theirs[:, LENGTH:], labels)
        parameters = dict(checkpoint.model.named_parameters())
        check_gradients(what, grads, gradients(objectives(their_terms), {n: parameters[n] for n in names}))

        stored |= rounded({"logits": logits} | grads, f"b{block}/")
        values[f"b{block}"] = scalars(terms)
    write_tensors(folder / f"{name}.safetensors", stored)
    return values


def packed_terms(logits: torch.Tensor, layout: Layout, labels: list[torch.Tensor]) -> Losses:
    """The terms of packed documents, each counted as a sample."""
    each = []
    for number, label in enumerate(labels):
        noisy, clean = logits[:, layout.document == number].chunk(2, dim=1)
        each.append(losses(noisy, clean, label))
    targets = torch.tensor([(label[:, 1:] != IGNORED).sum() for label in labels])
    noisy, clean = (torch.cat([getattr(t, f"{half}_per_sample") for t in each]) for half in ("noisy", "clean"))
    return Losses(noisy, clean, noisy.mean(), (clean * targets).sum() / targets.sum())


def write_packed(out: Path, folder: Path) -> dict[str, Any]:
    """Write the case of two documents in one row; return its scalars."""
    checkpoint = open_checkpoint(out / BASE)
    shapes = zip(PACKED_LENGTHS, PACKED_PROMPTS, strict=True)
    samples = [make_sample(length, prompt, seed=50 + i) for i, (length, prompt) in enumerate(shapes)]
    documents = [(tokens[None], labels[None]) for tokens, labels in samples]
    batch = make_input(documents, PACKED_BLOCK)
    logits = run(checkpoint, batch)
    terms = packed_terms(logits, batch.layout, [labels for _, labels in documents])
    parameters = {n: checkpoint.weights[n] for n in PARAMETERS}
    grads = gradients({"loss_fixed": objectives(terms)["loss_fixed"]}, parameters)

    require_close("packed", logits, hf_logits(checkpoint.model, batch), TOLERANCE)
    each = {f"doc{n}/logits": logits[0, batch.layout.document == n] for n in range(len(documents))}
    for document, together in zip(documents, each.values(), strict=True):
        alone = hf_logits(checkpoint.model, make_input([document], PACKED_BLOCK))[0]
        require_close("packed document", together, alone, TOLERANCE)

    row = {
        "tokens": torch.cat([tokens for tokens, _ in documents], dim=1),
        "labels": torch.cat([labels for _, labels in documents], dim=1),
        "segments": batch.layout.document[~batch.layout.noisy][None],
        "positions": batch.layout.positions[~batch.layout.noisy][None],
    }
    write_tensors(folder / "packed.safetensors", row | rounded(each | grads))
    return scalars(terms)


def write_adapter(out: Path, folder: Path) -> tuple[Lora, torch.Tensor]:
    """Write the adapter with its mask embedding; return them in float64, leaves of the gradient, the gate empty."""
    config = LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=[*ATTENTION, *MLP], task_type="CAUSAL_LM")
    plain = load(out / BASE)
    plain.name_or_path = BASE  # else PEFT stores the path of this machine
    model = get_peft_model(plain, config)
    randomise_adapter(model, seed=60)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT keeps the targets in a set, whose order changes from run to run.
    written = json.loads((folder / "adapter_config.json").read_text())
    written.update(base_model_name_or_path=BASE, target_modules=sorted(written["target_modules"]))
    write_json(folder / "adapter_config.json", written)
    mask_embedding = torch.randn(plain.config.hidden_size, generator=generator(61))
    mask_embedding /= math.sqrt(plain.config.hidden_size)  # as large as the other embeddings
    write_tensors(folder / "mask_embedding.safetensors", {"mask_embedding": mask_embedding})
    write_json(folder / "idlm_adapter.json", {"format": 1, "mask_token_id": MASK})

    parameters, matrices = dict(model.named_parameters()), {}
    for name, a in parameters.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            pair = (a, parameters[name.replace(".lora_A.", ".lora_B.")])
            matrices[module] = tuple(matrix.detach().double().requires_grad_() for matrix in pair)
    lora = Lora(matrices, LORA_ALPHA / RANK, torch.zeros(0, dtype=torch.bool))
    return lora, mask_embedding.double().requires_grad_()


def write_lora(out: Path, folder: Path) -> dict[str, Any]:
    """Write the three ways to gate one adapter; return their scalars."""
    checkpoint, (tokens, labels) = open_checkpoint(out / BASE), make_batch()
    lora, mask_embedding = write_adapter(out, folder / "adapter")
    batch = make_input([(tokens, labels)], LORA_BLOCK)
    everywhere = torch.ones_like(batch.is_mask)
    gates = {"gated": batch.is_mask, "gated_half": batch.layout.noisy & everywhere, "ungated": everywhere}
    parameters = {"mask_embedding": mask_embedding}
    for module, (a, b) in lora.matrices.items():
        if module.startswith("model.layers.0."):
            short = module.removeprefix("model.")
            parameters |= {f"{short}.lora_A": a, f"{short}.lora_B": b}

    stored, values, logits = {}, {}, {}
    for case, gate in gates.items():
        gated = replace(lora, gate=gate)
        logits[case] = run(checkpoint, batch, gated, mask_embedding)
        theirs = hf_logits(checkpoint.model, batch, gated, mask_embedding)
        require_close(case, logits[case], theirs, TOLERANCE)
        terms = losses(logits[case][:, :LENGTH], logits[case][:, LENGTH:], labels)
        wanted = {name: loss for name, loss in objectives(terms).items() if name != "loss_auto"}
        stored |= rounded({"logits": logits[case]} | gradients(wanted, parameters), f"{case}/")
        values[case] = scalars(terms)

    for case in ("gated", "gated_half"):
        check_clean(case, checkpoint.model, tokens, logits[case][:, LENGTH:])
    for i in range(len(tokens)):
        sample, noisy = (tokens[i], labels[i]), logits["gated"][i, :LENGTH]
        check_like_decoding("gated", checkpoint.model, sample, LORA_BLOCK, noisy, lora, mask_embedding)
    with_peft = hf_logits(PeftModel.from_pretrained(load(out / BASE), folder / "adapter"), batch, None, mask_embedding)
    require_close("ungated, PEFT", logits["ungated"], with_peft, TOLERANCE)
    for one, other in (("gated", "gated_half"), ("gated_half", "ungated")):
        effect = (logits[one] - logits[other])[batch.is_mask].abs().max().item()
        if effect < MIN_EFFECT:
            raise AssertionError(f"{one} and {other}: the mask rows differ by {effect:.3f} only")
    write_tensors(folder / "lora.safetensors", stored)
    return values


def write_soft(folder: Path) -> dict[str, Any]:
    """Write the losses between two distributions; return their means."""
    gen = generator(70)
    p_logits = 3 * torch.randn(SOFT_ROWS, VOCAB, generator=gen)
    q_logits = p_logits + 1.5 * torch.randn(SOFT_ROWS, VOCAB, generator=gen)
    log_p, leaf = p_logits.double().log_softmax(-1), q_logits.double().requires_grad_()
    log_q = leaf.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if (log_p - log_q).abs().min() < 1e-5:
        raise AssertionError("p and q nearly touch: the gradient of |p - q| has no sign there in float32")
    tokens = torch.multinomial(q.detach(), 1, generator=gen)
    rows = {
        "kl": (p * (log_p - log_q)).sum(-1),
        "tv": 0.5 * (p - q).abs().sum(-1),
        "accept": torch.minimum(p, q).sum(-1),
        "token_accept": (p / q).gather(1, tokens)[:, 0].clamp(max=1),
        "argmax_equal": p.argmax(-1) == q.argmax(-1),
    }
    require_close("1 - tv", 1 - rows["tv"], rows["accept"], 1e-12)
    grads = {
        f"grad_mean_{name}": torch.autograd.grad(rows[name].mean(), leaf, retain_graph=True)[0] for name in ("kl", "tv")
    }
    inputs = {"p_logits": p_logits, "q_logits": q_logits, "tokens": tokens[:, 0]}
    write_tensors(folder / "soft.safetensors", inputs | rounded(rows | grads))
    return {f"mean_{name}": row.double().mean().item() for name, row in rows.items()}


def write_training_cases(out: Path) -> None:
    """Write every file; the checkpoints of the part `hf` must be in `out` already."""
    folder = out / "training"
    folder.mkdir(exist_ok=True)
    values = {
        "settings": {
            "mask_token_id": MASK,
            "alpha": ALPHA,
            "length": LENGTH,
            "prompt_lengths": PROMPTS,
            "block_sizes": BLOCKS,
            "packed": {"base": BASE, "block": PACKED_BLOCK, "lengths": PACKED_LENGTHS, "prompts": PACKED_PROMPTS},
            "lora": {"base": BASE, "block": LORA_BLOCK, "rank": RANK, "alpha": LORA_ALPHA},
        },
        **{name: write_model(name, out, folder) for name in ("qwen3_tied", "qwen3_untied")},
        "packed": write_packed(out, folder),
        "lora": write_lora(out, folder),
        "soft": write_soft(folder),
    }
    write_json(folder / "training.json", values)
