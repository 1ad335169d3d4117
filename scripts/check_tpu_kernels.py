"""Check the Pallas TPU kernels on a real TPU against the reference, and time them beside what XLA makes of it.

Run on a TPU host, for instance in a Colab notebook: ``python scripts/check_tpu_kernels.py``. It prints one line a case:
the errors of both in bfloat16 against the reference in float32, and the median time of one call. Times are taken over
ten calls in one program, so that no launch is waited for. Exits with 1 if a kernel is further off than XLA's path.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import reference as window_reference
from pallas_kernels.decode_attention import tpu as window_tpu
from pallas_kernels.range_attention import reference as range_reference
from pallas_kernels.range_attention import tpu as range_tpu

CALLS = 10


def seconds(function: Callable, q: jax.Array, *others: object) -> float:
    """Median time of one of ``CALLS`` calls in a row, each with the result of the last as its queries."""
    repeated = jax.jit(lambda q, *others: jax.lax.fori_loop(0, CALLS, lambda _, q: function(q, *others), q))
    jax.block_until_ready(repeated(q, *others))
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        jax.block_until_ready(repeated(q, *others))
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / CALLS


def compare(name: str, kernel: Callable, xla: Callable, *arguments: object, work: tuple[float, str]) -> bool:
    """Print errors and times of two functions whose first argument and result are queries; whether the kernel is exact.

    ``work`` is what a call does (FLOPs or bytes), and its unit.
    """
    with jax.default_matmul_precision("highest"):
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
        wanted = np.asarray(jax.jit(xla)(*exact), np.float64)
    errors = [
        np.linalg.norm(np.asarray(jax.jit(f)(*arguments), np.float64) - wanted) / np.linalg.norm(wanted)
        for f in (kernel, xla)
    ]
    times = [seconds(function, *arguments) for function in (kernel, xla)]
    rates = [work[0] / t / 1e12 for t in times]
    print(f"{name}: error {errors[0]:.1e}, XLA {errors[1]:.1e}; {times[0] * 1e3:.3f} ms, XLA {times[1] * 1e3:.3f} ms; "
          f"{rates[0]:.2f} T{work[1]}/s, XLA {rates[1]:.2f}", flush=True)  # fmt: skip
    return errors[0] <= 1.1 * errors[1]


def queries_gradient(attend: Callable) -> Callable:
    """Forward and backward pass, all gradients used, as a function from queries to queries."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *others: object) -> jax.Array:
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, *others), q, k, v)
        d_q, d_k, d_v = backward(out)
        return d_q + (jnp.mean(d_k) + jnp.mean(d_v)).astype(d_q.dtype)

    return run


def main() -> None:
    """Check and time training shapes, then decoding shapes."""
    rng, fine = np.random.default_rng(0), []
    normal = lambda *sizes: jnp.asarray(rng.normal(size=sizes), jnp.bfloat16)  # noqa: E731
    for length, heads, kv_heads, head_dim in ((4096, 32, 8, 128), (4096, 16, 8, 128), (4096, 9, 3, 64)):
        rows = length // 3 * 3
        q, k, v = normal(1, rows, heads, head_dim), *(normal(1, length, kv_heads, head_dim) for _ in "kv")
        own = tuple(normal(1, rows, kv_heads, head_dim) for _ in "kv")
        end = jnp.asarray(np.repeat(np.sort(rng.integers(0, length, rows // 3)), 3)[None], jnp.int32)
        flops = 4 * float(jnp.sum(end)) * heads * head_dim
        arguments = (q, k, v, jnp.zeros_like(end), end, own)
        kernel, xla = (partial(module.range_attention, group_size=3) for module in (range_tpu, range_reference))
        shape = f"L {length}, {heads}/{kv_heads} heads, d {head_dim}"
        fine.append(compare(f"groups, {shape}", kernel, xla, *arguments, work=(flops, "FLOP")))
        both = (queries_gradient(kernel), queries_gradient(xla))
        fine.append(compare(f"with gradients, {shape}", *both, *arguments, work=(3.5 * flops, "FLOP")))
    for batch, window, slots, kv_heads, head_dim in (
        (1, 7, 32768, 8, 128),
        (32, 7, 4096, 8, 128),
        (8, 16, 4096, 3, 64),
    ):
        q = normal(batch, window, kv_heads * (4 if head_dim == 128 else 3), head_dim)
        k, v = (normal(batch, kv_heads, slots, head_dim) for _ in "kv")
        prefix = jnp.full(batch, slots - window, jnp.int32)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((window, window), bool)), (batch, window, window))
        functions = (window_tpu.window_attention, window_reference.window_attention)
        name = f"window of {window}, batch {batch}, {slots} slots, {kv_heads} key heads, d {head_dim}"
        fine.append(compare(name, *functions, q, k, v, prefix, mask, work=(k.nbytes + v.nbytes, "byte")))
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
