"""LoRA adapters of the tiny `qwen3_tied` model, as PEFT saves them, with the logits of the adapted model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from golden.common import forward, generator, load, make_input_ids, write_json, write_tensors

BASE = "qwen3_tied"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# The adapter must move the logits (whose std is 1) at least this far from the base model's.
MIN_EFFECT = 0.5


@dataclass(frozen=True)
class AdapterCase:
    """One adapter to write."""

    name: str  # folder under tests/golden
    seed: int  # of A and B
    rank: int  # R
    alpha: int  # the delta is scaled by alpha / R, or alpha / sqrt(R) with rslora
    targets: tuple[str, ...]  # names of the adapted Linears
    rslora: bool = False


CASES = (
    AdapterCase("peft_r8", seed=30, rank=8, alpha=16, targets=ATTENTION + MLP),
    AdapterCase("peft_qv_r4", seed=31, rank=4, alpha=8, targets=("q_proj", "v_proj"), rslora=True),
)


@torch.no_grad()
def randomise_adapter(model: PeftModel, seed: int) -> None:
    """Fill A and B; PEFT starts B at zero, which would hide every mistake."""
    gen = generator(seed)
    for name, param in sorted(model.named_parameters()):
        if "lora_A" in name:
            param.copy_(torch.randn(param.shape, generator=gen) / math.sqrt(param.shape[1]))
        elif "lora_B" in name:
            param.copy_(0.3 * torch.randn(param.shape, generator=gen))


def write_adapter(case: AdapterCase, out: Path) -> None:
    """Write one folder: `adapter_config.json`, `adapter_model.safetensors` and `golden.safetensors`."""
    folder, input_ids = out / case.name, make_input_ids()
    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.alpha,
        target_modules=list(case.targets),
        use_rslora=case.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE,
    )
    plain = load(out / BASE)
    plain.name_or_path = BASE  # else PEFT warns of, and stores, the path of this machine
    model = get_peft_model(plain, config)
    randomise_adapter(model, case.seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT keeps the targets in a set, whose order changes from run to run.
    written = json.loads((folder / "adapter_config.json").read_text())
    written.update(base_model_name_or_path=BASE, target_modules=sorted(written["target_modules"]))
    write_json(folder / "adapter_config.json", written)

    base = load(out / BASE)
    base_logits = forward(base, input_ids)
    logits = forward(PeftModel.from_pretrained(base, folder), input_ids)
    effect = (logits - base_logits).abs().max().item()
    if effect < MIN_EFFECT:
        raise AssertionError(f"{case.name}: the adapter changes the logits by {effect:.3f} only")
    write_tensors(folder / "golden.safetensors", {"input_ids": input_ids, "logits": logits})


def write_peft_cases(out: Path) -> None:
    """Write every adapter; the base model must be in `out` already."""
    for case in CASES:
        write_adapter(case, out)
