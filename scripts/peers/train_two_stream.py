"""A training step of I-DLM in PyTorch, the peer of scripts/bench_train_step.py: tokens/s, memory, and MFU.

Run by hand on a GPU, in the same session as that script (a tiny shape runs on a CPU, to see that it works):

    python scripts/peers/train_two_stream.py --cases qwen3-8b-gated
    python scripts/peers/train_two_stream.py --cases qwen3-0.6b-full --batch 24 --steps 3
    python scripts/peers/train_two_stream.py --cases qwen3-8b-gated --batch 1 --no-checkpoint
    python scripts/peers/train_two_stream.py --cases tiny tiny-gated --steps 2          # a check on a CPU
    python scripts/peers/train_two_stream.py --check two_stream.npz        # against ours: write_two_stream_check.py

It needs torch, transformers 5, and peft. Shapes, batches, random group starts, losses and the count of useful FLOPs are
those of our bench. It is made as fast as stock parts allow:

- transformers' Qwen3 layers, each compiled (all share one program), bf16; AdamW, fused, on float32 master weights.
- ``full``: one pass over [clean | noisy]; the clean rows attend through cuDNN, the noisy ones through FlexAttention,
  with one BlockMask a step for all layers.
- ``gated-lora``: two passes. The clean one runs without gradients and with PEFT's adapter switched off, and keeps the
  keys and values of each layer; the noisy one has the adapter on every row and sees them. One pass with a row-wise gate
  would keep the clean rows' activations and run their adapter for nothing. FlexAttention computes gradients of the
  clean keys all the same; it cannot leave them out.
- Cross entropy and total variation in chunks of rows, each compiled, with gradients taken in the forward pass, so that
  no logits are kept and none are computed twice.
- The number of noisy rows is cut to a multiple of 128 (4096 for 4098), so that FlexAttention needs no masked loads.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    TINY,
    causal,
    default_device,
    first_line,
    masked,
    noisy_block_mask,
    noisy_row_count,
    peak_flops,
    prefer_cudnn,
    print_table,
    print_versions,
    qwen3_config,
    useful_flops,
)
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Qwen3ForCausalLM

BLOCK_SIZE, CLEAN_WEIGHT, LEARNING_RATE, CLIP = 3, 0.2, 1e-5, 1.0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape to time."""

    model: str
    mode: str
    length: int
    batch: int
    rank: int = 0
    noisy_loss: str = "ce"


CASES = {
    "tiny": Case("tiny", "full", 64, 2),
    "tiny-tied": Case("tiny-tied", "full", 64, 2),
    "tiny-gated": Case("tiny", "gated-lora", 64, 2, rank=4, noisy_loss="tv"),
    "qwen3-0.6b-full": Case("qwen3-0.6b", "full", 4096, 8),
    "qwen3-8b-gated": Case("qwen3-8b", "gated-lora", 4096, 2, rank=128, noisy_loss="tv"),
}


@dataclasses.dataclass(frozen=True)
class NoisyRows:
    """The rows of all mask groups of a batch of whole-row documents in which every token is learnt."""

    positions: torch.Tensor  # [B, R]
    # Every row sees the clean tokens before this one.
    key_end: torch.Tensor  # [B, R]
    # The clean row that predicts the same token, that token, and whether there is one.
    clean_row: torch.Tensor  # [B, R]
    targets: torch.Tensor  # [B, R]
    is_target: torch.Tensor  # bool [B, R]


def draw_starts(batch: int, length: int, rows: int, device: str) -> torch.Tensor:
    """First tokens of the mask groups [B, G], without replacement, in the order of the text."""
    eligible = torch.rand(batch, length - 2, device=device)
    return (eligible.topk(-(-rows // BLOCK_SIZE), dim=1).indices + 1).sort(dim=1).values


def lay_out(starts_BG: torch.Tensor, tokens_BL: torch.Tensor, rows: int) -> NoisyRows:
    """The first ``rows`` rows of the groups."""
    length = tokens_BL.shape[1]
    index = (starts_BG[:, :, None] + torch.arange(BLOCK_SIZE, device=starts_BG.device)).flatten(1)[:, :rows]
    inside = index.clamp(max=length - 1)
    key_end = starts_BG.repeat_interleave(BLOCK_SIZE, dim=1)[:, :rows]
    targets = tokens_BL.gather(1, (inside + 1).clamp(max=length - 1))
    return NoisyRows(index, key_end.contiguous(), inside, targets, index < length - 1)


def attend(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: None,
    scaling: float,
    block_mask: BlockMask | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    store: list | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: clean rows alone (kept in ``store``), noisy rows behind a ``prefix``, or both at once."""
    if store is not None:
        store.append((k, v))
    if block_mask is None:
        out = causal(q, k, v, scaling)
    elif prefix is not None:
        k, v = (torch.cat([before, own], dim=2) for before, own in zip(prefix, (k, v), strict=True))
        out = masked(q, k, v, block_mask, scaling)
    else:
        clean = k.shape[2] - block_mask.seq_lengths[0]
        noisy = masked(q[:, :, clean:], k, v, block_mask, scaling)
        out = torch.cat([causal(q[:, :, :clean], k[:, :, :clean], v[:, :, :clean], scaling), noisy], dim=2)
    return out.transpose(1, 2), None


AttentionInterface.register("two_stream", attend)


def chunk_loss(
    kind: str,
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    teacher_ND: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of the losses of some rows: ``ce``, or ``tv`` against the teacher's distribution."""
    logits = linear(hidden_ND, head_VD).float()
    if kind == "ce":
        return (weights_N * cross_entropy(logits, targets_N, reduction="none")).sum()
    with torch.no_grad():
        wanted = linear(teacher_ND, head_VD).float().softmax(-1)
    return (weights_N * 0.5 * (wanted - logits.softmax(-1)).abs().sum(-1)).sum()


class ChunkedLoss(torch.autograd.Function):
    """``chunk_loss`` of many rows, chunk by chunk, with its gradients taken at once."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, loss_of: Callable, rows: int, *others: Any) -> Any:
        """``others`` are the teacher (or None), targets and weights, one row each; a chunk has ``rows`` rows."""
        grad_hidden, total = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        for at in range(0, len(hidden), rows):
            chunk = slice(at, at + rows)
            part, weight = hidden[chunk].detach().requires_grad_(), head.detach()
            with torch.enable_grad():
                if grad_head is not None:
                    weight.requires_grad_()
                loss = loss_of(part, weight, *[None if other is None else other[chunk] for other in others])
                grads = torch.autograd.grad(loss, (part, weight) if grad_head is not None else (part,))
            grad_hidden[chunk] = grads[0]
            total += loss.detach()
            if grad_head is not None:
                grad_head += grads[1]
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        """The stored gradients, scaled."""
        grad_hidden, grad_head = ctx.saved_tensors
        grads = (grad_hidden * scale, None if grad_head is None else grad_head * scale)
        return *grads, None, None, None, None, None


class TwoStream:
    """A model with random weights and the loss of a batch."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, options: argparse.Namespace):
        self.case, self.device, self.options = case, device, options
        config = qwen3_config(case.model)
        config._attn_implementation = "two_stream"
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with torch.device(device):
            self.model = Qwen3ForCausalLM(config).train()
            self.adapted = self._adapt() if case.rank else None
        torch.set_default_dtype(default)
        self.config, self.head = config, self.model.lm_head.weight
        self.mask_token_id = 255 if case.model in TINY else 16
        embedding = self.model.model.embed_tokens.weight
        self.mask_embedding = nn.Parameter(embedding.detach().float().mean(0).to(dtype)) if case.rank else None
        self.make_mask, self.chunk_loss = create_block_mask, chunk_loss
        if device == "cuda":
            self.make_mask = torch.compile(create_block_mask, dynamic=False)
            self.chunk_loss = torch.compile(chunk_loss, dynamic=False)
            for layer in self.model.model.layers:
                layer.compile(dynamic=False, mode=options.compile_mode)

    def _adapt(self) -> Any:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=self.case.rank, lora_alpha=2 * self.case.rank, target_modules=LINEARS)
        return get_peft_model(self.model, lora, autocast_adapter_dtype=False)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, under the names of a checkpoint."""
        names = {name: value for name, value in self.named_weights().items() if value.requires_grad}
        return names if self.mask_embedding is None else {**names, "mask_embedding": self.mask_embedding}

    def named_weights(self) -> dict[str, nn.Parameter]:
        """All weights under the names of a checkpoint."""
        parameters = self.model.named_parameters()
        return {name.replace(".base_layer", "").replace(".default", ""): value for name, value in parameters}

    def layers(self, x: torch.Tensor, positions: torch.Tensor, per_layer: list[dict], save: bool) -> torch.Tensor:
        """Final hidden states [B, rows, D]."""
        model = self.model.model
        rope = model.rotary_emb(x, positions)
        for layer, extra in zip(model.layers, per_layer, strict=True):
            if save:
                x = checkpoint(
                    layer, x, position_embeddings=rope, use_reentrant=False, preserve_rng_state=False, **extra
                )
            else:
                x = layer(x, position_embeddings=rope, **extra)
        return model.norm(x)

    def loss(self, tokens: torch.Tensor, starts: torch.Tensor, rows: int, chunk: int = 4096) -> torch.Tensor:
        """CE_noisy + α CE_clean (full), or the noisy loss alone (gated-lora)."""
        batch, length = tokens.shape
        noisy = lay_out(starts, tokens, rows)
        weights = noisy.is_target / noisy.is_target.sum()
        mask = noisy_block_mask(noisy.key_end, length, BLOCK_SIZE, self.make_mask)
        depth, save = self.config.num_hidden_layers, self.options.checkpoint
        clean = self.model.model.embed_tokens(tokens)
        positions = torch.arange(length, device=self.device).expand(batch, -1)
        if self.adapted is not None:
            with torch.no_grad(), self.adapted.disable_adapter():
                stores: list[list] = [[] for _ in range(depth)]
                clean_hidden = self.layers(clean, positions, [{"store": store} for store in stores], False)
            x = self.mask_embedding.expand(batch, rows, -1).contiguous()
            behind = [{"block_mask": mask, "prefix": store[0]} for store in stores]
            hidden = self.layers(x, noisy.positions, behind, save)
            teacher = clean_hidden.gather(1, noisy.clean_row[..., None].expand(-1, -1, clean_hidden.shape[-1]))
            others = (teacher.flatten(0, 1), noisy.targets.flatten(), weights.flatten())
        else:
            x = self.model.model.embed_tokens.weight[self.mask_token_id].expand(batch, rows, -1)
            both = torch.cat([positions, noisy.positions], dim=1)
            hidden = self.layers(torch.cat([clean, x], dim=1), both, [{"block_mask": mask}] * depth, save)
            targets = torch.cat([tokens.roll(-1, dims=1), noisy.targets], dim=1)
            clean_weights = torch.full(tokens.shape, CLEAN_WEIGHT / (batch * (length - 1)), device=self.device)
            clean_weights[:, -1] = 0
            others = (None, targets.flatten(), torch.cat([clean_weights, weights], dim=1).flatten())

        def loss_of(*arguments: Any) -> torch.Tensor:
            return self.chunk_loss(self.case.noisy_loss, *arguments)

        return ChunkedLoss.apply(hidden.flatten(0, 1), self.head, loss_of, chunk, *others)


class Optimizer:
    """AdamW on float32 copies of the trained weights."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights = weights
        self.masters = [weight.detach().float().clone() for weight in weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Take the gradients of the weights, clip, update, and write the weights back."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        torch._foreach_copy_(self.weights, self.masters)


def run(case: Case, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compile and time one case."""
    torch.manual_seed(0)
    peer = TwoStream(case, device, torch.bfloat16, options)
    config, rows = peer.config, noisy_row_count(case.length, BLOCK_SIZE)
    if device == "cuda":
        name = prefer_cudnn(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        print(f"{case.model}: weights made, clean attention through {name}", flush=True)
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        optimizer = Optimizer(list(peer.trained().values()))

    def step(tokens: torch.Tensor) -> float:
        loss = peer.loss(tokens, draw_starts(case.batch, case.length, rows, device), rows)
        loss.backward()
        with torch.no_grad():
            optimizer.step()
        return loss.item()

    seconds, losses = [], []
    for number in range(options.steps + 2):
        tokens = torch.randint(0, config.vocab_size - 1, (case.batch, case.length), device=device)
        began = time.perf_counter()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - began)
        if number < 2:
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            print(f"step {number}, not counted: {seconds[-1]:.1f} s; graph breaks: {breaks}", flush=True)
    median, tokens_a_step = statistics.median(seconds[2:]), case.batch * case.length
    peak, flops = peak_flops(device), step_flops(case, config, rows)
    return {
        "model": case.model,
        "mode": case.mode,
        "framework": "torch",
        "length": case.length,
        "batch": case.batch,
        "checkpoint": options.checkpoint,
        "seconds": round(median, 4),
        "tokens_per_second": round(tokens_a_step / median),
        "useful_tflops": round(flops / median / 1e12, 1),
        "mfu": None if peak is None else round(flops / median / peak, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device == "cuda" else None,
        "first_step_seconds": round(seconds[0], 1),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
    }


def step_flops(case: Case, config: Any, rows: int) -> float:
    """Useful FLOPs of a step; the few rows at the end of the text that predict nothing are counted."""
    return useful_flops(
        config,
        case.mode,
        tokens=case.batch * case.length,
        noisy_rows=case.batch * rows,
        clean_rows=case.batch * (case.length - 1),
        length=case.length,
        block_size=BLOCK_SIZE,
        rank=case.rank,
        soft=case.noisy_loss != "ce",
    )


def check(path: Path, device: str, options: argparse.Namespace) -> None:
    """Compare loss, gradients and useful FLOPs in float32 with what write_two_stream_check.py wrote."""
    data = np.load(path)
    for name in ("tiny", "tiny-tied", "tiny-gated"):
        arrays = {key.removeprefix(f"{name}/"): data[key] for key in data if key.startswith(f"{name}/")}
        tokens, starts = (torch.from_numpy(arrays[key]).long().to(device) for key in ("tokens", "starts"))
        case = dataclasses.replace(CASES[name], batch=tokens.shape[0], length=tokens.shape[1])
        peer = TwoStream(case, device, torch.float32, options)
        weights = {**peer.named_weights(), **peer.trained()}
        with torch.no_grad():
            for key, weight in weights.items():
                weight.copy_(torch.from_numpy(arrays[f"weight/{key}"]))
        rows = starts.shape[1] * BLOCK_SIZE
        loss = peer.loss(tokens, starts, rows, chunk=16)
        loss.backward()
        loss_error = abs(loss.item() - float(arrays["loss"]))
        errors = {}
        for key, weight in peer.trained().items():
            theirs = torch.from_numpy(arrays[f"gradient/{key}"]).to(device)
            errors[key] = ((weight.grad - theirs).norm() / theirs.norm()).item()
        worst = max(errors, key=errors.get)
        flops = useful_flops(
            peer.config,
            case.mode,
            tokens=tokens.numel(),
            noisy_rows=int(arrays["noisy_rows"]),
            clean_rows=int(arrays["clean_rows"]),
            length=case.length,
            block_size=BLOCK_SIZE,
            rank=case.rank,
            soft=case.noisy_loss != "ce",
        )
        print(f"{name}: loss {loss.item():.6f}, error {loss_error:.1e}; gradients {errors[worst]:.1e} ({worst})")
        if not (loss_error < 1e-4 and errors[worst] < 1e-4):
            raise SystemExit(f"{name}: loss or gradients differ from ours")
        if flops != float(arrays["useful_flops"]):
            raise SystemExit(f"{name}: {flops} useful FLOPs, ours {arrays['useful_flops']}")


def main() -> None:
    """Time the cases asked for and print a table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["qwen3-0.6b-full", "qwen3-8b-gated"])
    parser.add_argument("--batch", type=int, help="rows a step, instead of the case's")
    parser.add_argument("--length", type=int, help="tokens a row, instead of the case's")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True, help="layers, backward")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile, for the layers")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with ours in float32 and end")
    options = parser.parse_args()
    device = default_device()
    print_versions(device)
    if options.check:
        check(options.check, device, options)
        return
    changes = {key: value for key in ("batch", "length") if (value := getattr(options, key)) is not None}
    rows = []
    for name in options.cases:
        case = dataclasses.replace(CASES[name], **changes)
        try:
            row = run(case, device, options)
        except torch.OutOfMemoryError as error:  # say so and go on with the others
            row = {"model": case.model, "mode": case.mode, "framework": "torch", "error": first_line(error)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    keys = ("model", "mode", "framework", "length", "batch", "checkpoint", "seconds", "tokens_per_second")
    print_table(rows, (*keys, "useful_tflops", "mfu", "peak_gb"))


if __name__ == "__main__":
    main()
