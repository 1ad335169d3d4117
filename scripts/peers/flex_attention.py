"""Time PyTorch's FlexAttention over both streams of training, the peer of scripts/bench_range_attention.py.

Run by hand on a GPU, in the same session as that script (a tiny shape runs on a CPU, to see that it works):

    python scripts/peers/flex_attention.py                                  # L = 4096, 32/8 heads of 128, groups of 3
    python scripts/peers/flex_attention.py --compile-mode default max-autotune-no-cudagraphs
    python scripts/peers/flex_attention.py --length 64 --heads 4 --kv-heads 2 --head-dim 16 --dtype float32 --calls 2

The streams, the flags, and the useful FLOPs are those of that script: visible pairs × heads × head_dim × 4 forward, 14
forward and backward, and 10 for ``gated``, the noisy stream alone with the clean keys held constant. The noisy rows are
cut to a multiple of 128 (4096 for 4098) and counted as they are, so that FlexAttention needs no masked loads.

- ``flex``: one call over [clean | noisy].
- ``cudnn + flex``: the clean rows by scaled_dot_product_attention, the noisy ones by FlexAttention.
- ``cudnn causal``: no two streams, a plain causal mask over the clean rows alone, with its own FLOPs.

Every one but the last is first compared with dense float32 attention.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import (
    causal,
    default_device,
    first_line,
    masked,
    noisy_block_mask,
    noisy_row_count,
    prefer_cudnn,
    print_table,
    print_versions,
    seconds_of,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

FORWARD, BACKWARD, BACKWARD_GATED = 4, 10, 6
PEERS = ("flex", "cudnn + flex", "cudnn causal")


def two_stream_block_mask(length: int, rows: int, size: int, device: str) -> BlockMask:
    """Who sees whom among [clean | noisy]; a group stands at every multiple of ``size``."""

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        row, own = q - length, k - length
        before = torch.where(q < length, k <= q, k < row // size * size) & (k < length)
        return before | ((q >= length) & (own >= 0) & (own // size == row // size) & (own <= row))

    return create_block_mask(visible, None, None, length + rows, length + rows, device=device)


class Streams:
    """Arrays of both streams [B, heads, rows, d], their masks, and the functions to time."""

    def __init__(self, length: int, size: int, batch: int, flex: Callable[..., Any], options: argparse.Namespace):
        device, self.flex = default_device(), flex
        torch.manual_seed(0)
        self.length, self.rows, self.size, self.batch = length, noisy_row_count(length, size), size, batch
        counts = (options.heads, options.kv_heads, options.kv_heads)
        shapes = [(batch, heads, length + self.rows, options.head_dim) for heads in counts]
        self.arrays = [torch.randn(shape, device=device, dtype=getattr(torch, options.dtype)) for shape in shapes]
        key_end = torch.arange(self.rows, device=device) // size * size
        self.masks = {
            "flex": two_stream_block_mask(length, self.rows, size, device),
            "noisy": noisy_block_mask(key_end.repeat(batch, 1), length, size),
        }
        self.noisy_pairs = batch * int(key_end.sum() + (torch.arange(self.rows) % size + 1).sum())
        self.clean_pairs = batch * length * (length + 1) // 2

    def attend(self, peer: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The outputs of all rows."""
        if peer == "flex":
            return masked(q, k, v, self.masks["flex"], flex=self.flex)
        clean = [array[:, :, : self.length] for array in (q, k, v)]
        if peer == "cudnn causal":
            return causal(*clean)
        return torch.cat([causal(*clean), self.attend_noisy(q[:, :, self.length :], k, v)], dim=2)

    def attend_noisy(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The outputs of the noisy rows, of the keys of both streams."""
        return masked(q, k, v, self.masks["noisy"], flex=self.flex)

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The outputs of all rows with the whole mask, one element at a time."""
        side = self.length + self.rows
        mask = create_mask(self.masks["flex"].mask_mod, 1, 1, side, side, device=q.device)
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    def functions(self, peer: str) -> Iterator[tuple[str, Callable[[], Any], int]]:
        """(name, function, useful FLOPs a head dimension of a head)."""
        leaves = [array.requires_grad_() for array in self.arrays]
        pairs = self.clean_pairs + (0 if peer == "cudnn causal" else self.noisy_pairs)
        yield "forward", lambda: forward_only(lambda *a: self.attend(peer, *a), leaves), FORWARD * pairs
        yield "both", lambda: with_gradients(lambda *a: self.attend(peer, *a), leaves), (FORWARD + BACKWARD) * pairs
        if peer != "cudnn causal":
            noisy = [array.detach()[:, :, self.length :].clone().requires_grad_() for array in leaves]
            prefix = [array.detach()[:, :, : self.length] for array in leaves[1:]]

            def gated(q: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
                keys = [torch.cat(pair, dim=2) for pair in zip(prefix, own, strict=True)]
                return self.attend_noisy(q, *keys)

            yield "gated", lambda: with_gradients(gated, noisy), (FORWARD + BACKWARD_GATED) * self.noisy_pairs


def forward_only(function: Callable[..., torch.Tensor], arrays: list[torch.Tensor]) -> torch.Tensor:
    """The outputs, with nothing kept."""
    with torch.no_grad():
        return function(*arrays)


def with_gradients(function: Callable[..., torch.Tensor], arrays: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs and every gradient; the cotangent is the output itself."""
    out = function(*arrays)
    return out, *torch.autograd.grad(out, arrays, out.detach())


def worst_error(peer: str, streams: Streams) -> float:
    """Of the outputs and all gradients, the largest norm of the difference from float32 over the norm."""
    ours = with_gradients(lambda *a: streams.attend(peer, *a), [array.requires_grad_() for array in streams.arrays])
    exact = with_gradients(streams.dense, [array.detach().float().requires_grad_() for array in streams.arrays])
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True))


def bench(peer: str, length: int, size: int, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare and time one way at one length."""
    device, flex = default_device(), flex_attention
    torch._dynamo.reset()
    if device == "cuda":
        flex = torch.compile(flex_attention, dynamic=False, mode=mode)
    row: dict[str, Any] = {"length": length, "group": size, "peer": peer, "compile mode": mode}
    if peer != "cudnn causal":
        checked = Streams(min(length, options.check_length), size, 1, flex, options)
        row["error"] = f"{worst_error(peer, checked):.1e}"
    streams = Streams(length, size, options.batch, flex, options)
    work = options.heads * options.head_dim / 1e12
    for name, function, flops in streams.functions(peer):
        seconds = seconds_of(function, device, options.calls, options.rounds)
        row |= {f"{name} ms": round(seconds * 1e3, 3), f"{name} TFLOP/s": round(flops * work / seconds, 1)}
    return row


def main() -> None:
    """Bench what the flags ask for and print one table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[4096], help="tokens of the clean stream")
    parser.add_argument("--group-size", type=int, nargs="+", default=[3])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--compile-mode", nargs="+", default=["default"], help="of torch.compile")
    parser.add_argument("--check-length", type=int, default=1024, help="length, at most, of the comparison in float32")
    parser.add_argument("--calls", type=int, default=20, help="calls queued in a round")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print_versions(default_device())
    if default_device() == "cuda":
        name = prefer_cudnn(options.heads, options.kv_heads, options.head_dim)
        print(f"scaled_dot_product_attention runs through {name}", flush=True)
    rows = []
    for length in options.length:
        for size in options.group_size:
            for mode in options.compile_mode:
                for peer in options.peers:
                    try:
                        rows.append(bench(peer, length, size, mode, options))
                    except RuntimeError as error:  # out of memory, or nothing that compiles: go on with the others
                        rows.append({"length": length, "group": size, "peer": peer, "error": first_line(error)})
                    print(rows[-1], flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
