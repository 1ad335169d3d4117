"""Time range attention over both streams of training, by every implementation that runs here: useful TFLOP/s.

Run by hand on a GPU (on a CPU only ``xla`` runs, at a tiny shape, to see that it works):

    python scripts/bench_range_attention.py                        # L = 4096, 32/8 heads of 128, groups of 3
    python scripts/bench_range_attention.py --length 1024 2048 4096 8192 --group-size 1 3 7
    python scripts/bench_range_attention.py --length 64 --heads 4 --kv-heads 2 --head-dim 16 --dtype float32 --calls 2

The clean stream is one document, causal; the noisy stream has as many mask groups as training has, one at every
multiple of the group size. Useful FLOPs are visible pairs × heads × head_dim × 4 forward and 14 forward and backward
(two products and seven). ``gated`` is the noisy stream alone without gradients of the clean keys, as gated training has
it: 10, five products. Every implementation is first compared with the reference in float32. Times are medians over
rounds of calls that are queued one behind another, so launches overlap as they do in a training step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.training.groups import GroupPolicy
from pallas_kernels.range_attention.api import IMPLEMENTATIONS, range_attention

# FLOPs a visible pair and head dimension: two products forward; five backward, three without gradients of the keys.
FORWARD, BACKWARD, BACKWARD_GATED = 4, 10, 6


def make_streams(length: int, size: int, heads: int, kv_heads: int, head_dim: int, batch: int, dtype: str) -> Any:
    """Arrays of both streams, and the intervals of their rows."""
    rows = GroupPolicy(size).groups(length) * size
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [
        (rows, heads),
        (rows, kv_heads),
        (rows, kv_heads),
        (length, heads),
        (length, kv_heads),
        (length, kv_heads),
    ]
    arrays = [
        jax.random.normal(key, (batch, count, some, head_dim), dtype)
        for key, (count, some) in zip(keys, shapes, strict=True)
    ]
    clean_end = jnp.broadcast_to(jnp.arange(length) + 1, (batch, length))
    noisy_end = jnp.broadcast_to(jnp.minimum(jnp.arange(rows) // size * size, length), (batch, rows))
    return arrays, (clean_end, noisy_end)


def attend(implementation: str, size: int, ends: Any, noisy: Any, clean: Any) -> tuple[jax.Array, jax.Array]:
    """The outputs of both streams."""
    (q_own, *own), (q, k, v) = noisy, clean
    clean_end, noisy_end = ends
    run = partial(range_attention, implementation=implementation)
    out = run(q, k, v, jnp.zeros_like(clean_end), clean_end)
    return out, run(q_own, k, v, jnp.zeros_like(noisy_end), noisy_end, tuple(own), size)


def with_gradients(implementation: str, size: int, ends: Any, noisy: Any, clean: Any) -> Any:
    """The outputs and every gradient; the cotangents are the outputs themselves."""
    out, pull = jax.vjp(partial(attend, implementation, size, ends), noisy, clean)
    return out, pull(out)


def gated(implementation: str, size: int, ends: Any, noisy: Any, clean: Any) -> Any:
    """The noisy stream alone and its gradients, with the clean keys held constant."""
    out, pull = jax.vjp(lambda noisy: attend(implementation, size, ends, noisy, clean)[1], noisy)
    return out, pull(out)


def seconds_of(function: Callable[..., Any], arguments: Any, calls: int, rounds: int) -> float:
    """Median seconds a call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def worst_error(ours: Any, exact: Any) -> float:
    """Of all arrays, the largest norm of the difference over the norm."""

    def error(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(error, ours, exact)))


def bench(implementation: str, length: int, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compare and time one implementation at one length."""
    sizes = (options.heads, options.kv_heads, options.head_dim)
    # The reference in float32 holds every score: compared at a length whose scores fit.
    checked = min(length, options.check_length)
    arrays, ends = make_streams(checked, size, *sizes, 1, options.dtype)
    arguments = (arrays[:3], arrays[3:])
    exact_arguments = jax.tree.map(lambda array: array.astype(jnp.float32), arguments)
    exact = jax.jit(partial(with_gradients, "xla", size, ends))(*exact_arguments)
    error = worst_error(jax.jit(partial(with_gradients, implementation, size, ends))(*arguments), exact)
    del exact

    arrays, ends = make_streams(length, size, *sizes, options.batch, options.dtype)
    arguments = (arrays[:3], arrays[3:])
    noisy_pairs = int(ends[1].sum()) + options.batch * ends[1].shape[1] * (size + 1) // 2
    pairs = int(ends[0].sum()) + noisy_pairs
    row = {"length": length, "group": size, "implementation": implementation, "error": f"{error:.1e}"}
    work = options.heads * options.head_dim / 1e12
    for name, function, flops in (
        ("forward", attend, FORWARD * pairs),
        ("both", with_gradients, (FORWARD + BACKWARD) * pairs),
        ("gated", gated, (FORWARD + BACKWARD_GATED) * noisy_pairs),
    ):
        compiled = jax.jit(partial(function, implementation, size, ends))
        seconds = seconds_of(compiled, arguments, options.calls, options.rounds)
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
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, help="all that run here by default")
    parser.add_argument("--check-length", type=int, default=1024, help="length, at most, of the comparison in float32")
    parser.add_argument("--calls", type=int, default=20, help="calls queued in a round")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    all_here = ["pallas", "cudnn", "xla"] if jax.default_backend() == "gpu" else ["xla"]
    implementations = options.implementations or all_here
    rows = []
    for length in options.length:
        for size in options.group_size:
            for implementation in implementations:
                try:
                    rows.append(bench(implementation, length, size, options))
                # Out of memory, or not for this device or these shapes: say so and go on with the others.
                except (jax.errors.JaxRuntimeError, ValueError) as error:
                    first = (str(error).splitlines() or [repr(error)])[0][:200]
                    rows.append({"length": length, "group": size, "implementation": implementation, "error": first})
                print(rows[-1], flush=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |")


if __name__ == "__main__":
    main()
