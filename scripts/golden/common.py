"""What every kind of fixture shares: seeded weights, seeded inputs, the forward pass and deterministic files."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

BATCH = 2
LENGTH = 48
VOCAB = 96


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that the order in which fixtures are written does not matter."""
    return torch.Generator().manual_seed(seed)


def make_input_ids(vocab: int = VOCAB, length: int = LENGTH) -> torch.Tensor:
    """The same [BATCH, length] token ids for every model of one vocabulary size."""
    return torch.randint(0, vocab, (BATCH, length), generator=generator(7))


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter so that each one matters: norms far from one, biases far from zero, logits of std 1."""
    gen = generator(seed)
    for name, param in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            param.copy_(0.5 + torch.rand(param.shape, generator=gen))
        elif name.endswith("bias"):
            param.copy_(0.3 * torch.randn(param.shape, generator=gen))
        else:
            # Sharper than unit attention scores: a wrong RoPE or mask then moves the logits visibly.
            gain = 1.5 if ("q_proj" in name or "k_proj" in name) else 1.0
            param.copy_(gain / math.sqrt(param.shape[-1]) * torch.randn(param.shape, generator=gen))
    model.tie_weights()
    final_norm = model.model.norm.weight
    final_norm.div_(forward(model, make_input_ids(model.config.vocab_size)).std())


@torch.no_grad()
def forward(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] in float32, whatever the dtype of the model."""
    return model.eval()(input_ids=input_ids, use_cache=False).logits.float()


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """Read a model back as a user would; unlike `model.to`, this keeps the RoPE frequencies in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **kwargs).eval()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file; token ids become int32."""
    plain = {k: (v.int() if v.dtype == torch.int64 else v).contiguous() for k, v in tensors.items()}
    save_file(plain, path)


def write_json(path: Path, value: Any, sort_keys: bool = True) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n", encoding="utf-8")
