"""A transformers model and, by hand, a LoRA that acts on chosen rows only: the reference, no code shared with ours.

Plain PyTorch without a cache, one full forward pass whenever logits are wanted (method.md 4: y = W x + s · (m ⊙ (x Aᵀ))
Bᵀ, m being 1 on the mask rows that draft).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn


def load_gguf(path: Path, dtype: str, device: str) -> transformers.PreTrainedModel:
    """The PyTorch model, read and de-quantised from the GGUF file by transformers itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return model.to(device).eval()


def load_directory(path: Path, dtype: str, device: str) -> transformers.PreTrainedModel:
    """The PyTorch model of a Hugging Face directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="eager", device_map=device
    )
    return model.eval()


class Reference:
    """A model, its mask token, and maybe a PEFT adapter that acts where a gate says."""

    def __init__(self, model: transformers.PreTrainedModel, mask_token: int, adapter: Path | None = None):
        self.model = model
        self.mask_token = mask_token
        self.device = model.device
        # [B, L, 1]: 1 where the adapter acts, None where it acts nowhere.
        self._gate: Tensor | None = None
        if adapter is not None:
            self._attach(adapter)

    def _attach(self, directory: Path) -> None:
        config = json.loads((directory / "adapter_config.json").read_text())
        rank = config["r"]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        weights = load_file(directory / "adapter_model.safetensors")
        for key in [key for key in weights if key.endswith(".lora_A.weight")]:
            name = key.removesuffix(".lora_A.weight")
            a, b = (self._like_model(weights[f"{name}.lora_{side}.weight"]) for side in "AB")
            linear = self.model.get_submodule(name.removeprefix("base_model.model."))
            linear.register_forward_hook(self._lora_hook(a, b, scale))
        mask_file = directory / "mask_embedding.safetensors"
        if mask_file.is_file():
            (embedding,) = load_file(mask_file).values()
            self.model.get_input_embeddings().register_forward_hook(self._mask_hook(self._like_model(embedding)))

    def _like_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.model.dtype)

    def _lora_hook(self, a: Tensor, b: Tensor, scale: float) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output if self._gate is None else output + scale * (self._gate * (inputs[0] @ a.T)) @ b.T

        return hook

    def _mask_hook(self, embedding: Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output if self._gate is None else torch.where(self._gate > 0, embedding, output)

        return hook

    @torch.no_grad()
    def logits(self, tokens: Tensor, rows: Tensor, gate: Tensor | None = None) -> Tensor:
        """Float32 logits [B, R, V] of the given rows [B, R] of sequences [B, L].

        Attention is causal, so whatever stands to the right of a row does not matter: shorter sequences are padded
        there. ``gate`` [B, L] marks mask rows that draft.
        """
        self._gate = None if gate is None else gate[:, :, None].to(self.model.dtype)
        try:
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            self._gate = None
        chosen = torch.take_along_dim(hidden, rows[:, :, None], dim=1)
        return self.model.lm_head(chosen).float()

    @torch.no_grad()
    def layer_outputs(self, tokens: Tensor) -> list[Tensor]:
        """The residual stream [B, L, D] after every layer."""
        outputs: list[Tensor] = []
        layers = self.model.model.layers

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).float())

        handles = [layer.register_forward_hook(keep) for layer in layers]
        try:
            self.model.model(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return outputs
