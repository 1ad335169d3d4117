"""What the PyTorch peers share: shapes, the count of useful work, the two-stream mask, timing and tables.

The peers need torch (2.6 or newer) and transformers 5, PyYAML, and peft for the gated adapter; never jax, so they may
share a machine with our own benches, one after the other.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config

MODELS = Path(__file__).parents[2] / "configs" / "models"
# The tiny shape of scripts/bench_train_step.py, for a CPU; and with one matrix for embedding and head.
_TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY = {"tiny": _TINY, "tiny-tied": {**_TINY, "tie_word_embeddings": True}}
# Rows of a tile of FlexAttention; lengths that are multiples of it need no masked loads.
TILE = 128
# Dense bf16 FLOP/s by the data sheet, by how the name of the device begins; first match.
_PEAK_FLOPS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12}


def qwen3_config(name: str) -> Qwen3Config:
    """A shape of configs/models, or a tiny one."""
    if name in TINY:
        keys = TINY[name]
    else:
        keys = yaml.safe_load((MODELS / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {key: value for key, value in keys.items() if key not in ("architectures", "model_type", "torch_dtype")}
    return Qwen3Config(**keys, use_cache=False)


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """As the data sheet names it."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def print_versions(device: str) -> None:
    """What the numbers below were made with."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {device_name(device)}", flush=True)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device, or None for one we do not know."""
    name = device_name(device)
    return next((peak for kind, peak in _PEAK_FLOPS.items() if name.startswith(kind)), None)


def useful_flops(
    config: Qwen3Config,
    mode: str,
    *,
    tokens: int,
    noisy_rows: int,
    clean_rows: int,
    length: int,
    block_size: int,
    rank: int = 0,
    soft: bool = False,
) -> float:
    """What ``idlm_jax.training.metrics.useful_flops`` counts, for ``full`` and ``gated-lora`` on all seven linears."""
    heads_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linears = [(hidden, heads_dim), (hidden, kv_dim), (hidden, kv_dim), (heads_dim, hidden)]
    linears += [(hidden, inner), (hidden, inner), (inner, hidden)]
    body = 2 * layers * sum(inputs * outputs for inputs, outputs in linears)
    lora = 2 * layers * rank * sum(inputs + outputs for inputs, outputs in linears)
    head = 2 * hidden * config.vocab_size
    keys, pair = (length + 1) / 2, 4 * layers * heads_dim
    if mode == "gated-lora":
        noisy = noisy_rows * (2 * body + 3 * lora + pair * (2 * keys + (block_size + 1) / 2))
        return tokens * (body + pair * keys) + noisy + noisy_rows * head * (3 if soft else 2)
    return 3 * ((tokens + noisy_rows) * (body + pair * keys) + (clean_rows + noisy_rows) * head)


def noisy_row_count(length: int, block_size: int) -> int:
    """Rows of the noisy stream, one a clean token; the last group may be cut, so that tiles are full."""
    rows = -(-length // block_size) * block_size
    return rows - rows % TILE if rows >= TILE else rows


def noisy_block_mask(
    key_end_BR: torch.Tensor, length: int, block_size: int, make: Callable[..., BlockMask] = create_block_mask
) -> BlockMask:
    """Which keys of [clean | noisy] the noisy rows see: clean ones before ``key_end``, and their group, causally."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own = k - length
        return (k < key_end_BR[b, q]) | ((own // block_size == q // block_size) & (own <= q))

    batch, rows = key_end_BR.shape
    return make(visible, batch, None, rows, length + rows, device=key_end_BR.device)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Plain causal attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: BlockMask,
    scale: float | None = None,
    flex: Callable[..., Any] = flex_attention,
) -> torch.Tensor:
    """FlexAttention; on a CPU, where it has no gradients, the same with a dense mask."""
    if q.is_cuda:
        return flex(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)
    dense = create_mask(block_mask.mask_mod, block_mask.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return scaled_dot_product_attention(q, k, v, dense, scale=scale, enable_gqa=True)


def prefer_cudnn(heads: int, kv_heads: int, head_dim: int) -> str:
    """Have causal attention run by cuDNN, the fastest on Hopper, if it takes these heads; the name of what will run."""
    shapes = [(1, count, 2 * TILE, head_dim) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
    except RuntimeError as error:
        print(f"no cuDNN attention here: {str(error).splitlines()[0]}", flush=True)
        return "flash"
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)  # rather an error than that
    return "cudnn"


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], device: str, calls: int, rounds: int) -> float:
    """Median seconds a call, over rounds of calls that are queued one behind another; the first is not timed."""
    function()
    times = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def first_line(error: Exception) -> str:
    """What to say of a case that did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def print_table(rows: Sequence[dict[str, Any]], keys: Sequence[str] = ()) -> None:
    """Markdown."""
    keys = keys or list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, row.get("error", ""))) for key in keys) + " |")
