"""Time training losses and their gradients from hidden rows and a head, beside the bare products they are made of.

Run by hand on a GPU or TPU; first results are compared with whole logits, then each case is timed:

    python scripts/bench_linear_cross_entropy.py                                        # Qwen3-8B, 16k rows
    python scripts/bench_linear_cross_entropy.py --rows 96 --width 32 --vocab 500       # a check on a CPU
    python scripts/bench_linear_cross_entropy.py --losses tv --profile 12               # and the longest kernels

The products are those of all rows at once: logits in float32 (of the teacher's rows too), the gradient of the hidden
rows in bfloat16, and for a trained head its gradient in float32. A trained head is kept in float32; its copy in
bfloat16, which a training step has anyway, is not counted as scratch memory. Medians of calls timed one by one.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_train_step import longest_kernels

from pallas_kernels.linear_cross_entropy import reference
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES, SOFT_LOSSES

SEQUENCES = 4


def inputs(loss: str, rows: int, width: int, vocab: int, head_dtype: str) -> tuple[Any, ...]:
    """Random arguments after the name of the loss; logits have a standard deviation of about 3."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (SEQUENCES, rows // SEQUENCES)
    hidden, teacher = (jax.random.normal(key, (*shape, width), jnp.bfloat16) for key in keys[:2])
    head = (3 * width**-0.5 * jax.random.normal(keys[2], (vocab, width), jnp.bfloat16)).astype(head_dtype)
    targets = jax.random.randint(keys[3], shape, 0, vocab)
    weights = jnp.full((1, *shape), 1 / rows)
    return hidden, head, targets, weights, teacher if loss in SOFT_LOSSES else None


def value_and_gradient(function: Callable, loss: str, head_trained: bool) -> jax.stages.Wrapped:
    """The compiled loss of all rows, row losses, and the gradient of what is trained."""

    def value(hidden: jax.Array, head: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
        sums, losses = function(loss, hidden, head, *rest)
        return sums[0], losses

    return jax.jit(jax.value_and_grad(value, (0, 1) if head_trained else (0,), has_aux=True))


def check(loss: str, rows: int, width: int, vocab: int) -> float:
    """The largest error of losses and gradients against whole logits in float32, as a share of the largest entry.

    Raises AssertionError where it is more than bfloat16 explains.
    """
    given = inputs(loss, rows, width, vocab, "float32")
    exact = [array.astype(jnp.float32) if i in (0, 4) and array is not None else array for i, array in enumerate(given)]
    ours = value_and_gradient(linear_cross_entropy, loss, True)(*given)
    wanted = value_and_gradient(reference.linear_cross_entropy, loss, True)(*exact)
    error = 0.0
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        error = max(error, float(np.abs(mine - other).max() / np.abs(other).max()))
    assert error < 0.02, (loss, error)
    return error


def median_seconds(function: Callable, arguments: tuple[Any, ...], repeats: int) -> float:
    """Of calls that are waited for, after one that warms up."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@functools.partial(jax.jit, static_argnums=(2, 3))
def product(x: jax.Array, y: jax.Array, equation: str, dtype: str) -> jax.Array:
    """A bare product, summed in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(dtype)


def seconds_of_products(rows: int, width: int, vocab: int, repeats: int) -> dict[str, float]:
    """Seconds of each bare product of all rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
    head = jax.random.normal(keys[1], (vocab, width), jnp.bfloat16)
    seconds = {"logits": median_seconds(product, (hidden, head, "nd,vd->nv", "float32"), repeats)}
    d_logits = jax.random.normal(keys[2], (rows, vocab), jnp.bfloat16)
    seconds["d_hidden"] = median_seconds(product, (d_logits, head, "nv,vd->nd", "bfloat16"), repeats)
    seconds["d_head"] = median_seconds(product, (d_logits, hidden, "nv,nd->vd", "float32"), repeats)
    return seconds


def run(loss: str, head_trained: bool, arguments: argparse.Namespace, products: dict[str, float]) -> list[str]:
    """Compile and time one case: a row of the table."""
    rows, width, vocab = arguments.rows, arguments.width, arguments.vocab
    given = inputs(loss, rows, width, vocab, "float32" if head_trained else "bfloat16")
    program = value_and_gradient(linear_cross_entropy, loss, head_trained).lower(*given).compile()
    scratch = program.memory_analysis().temp_size_in_bytes - head_trained * 2 * vocab * width
    seconds = median_seconds(program, given, arguments.repeats)
    if arguments.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                jax.block_until_ready([program(*given) for _ in range(2)])
            print("\n".join(longest_kernels(Path(folder), arguments.profile, 2)), flush=True)
    bare = (2 if loss in SOFT_LOSSES else 1) * products["logits"] + products["d_hidden"]
    bare += products["d_head"] if head_trained else 0.0
    count = (2 if loss in SOFT_LOSSES else 1) + 1 + head_trained
    flops = 2 * rows * width * vocab * count
    trained = "trained" if head_trained else "frozen"
    row = [loss, trained, f"{1e3 * seconds:.1f}", f"{1e3 * bare:.1f}", f"{seconds / bare:.2f}"]
    return [*row, f"{flops / seconds / 1e12:.0f}", f"{scratch / 1e9:.2f}"]


def main() -> None:
    """Check, time the cases asked for, and print a table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384, help=f"a multiple of {SEQUENCES}")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--losses", nargs="+", choices=ROW_LOSSES, default=list(ROW_LOSSES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", type=int, default=0, metavar="COUNT", help="print so many of the longest kernels")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.rows} rows", flush=True)
    for loss in arguments.losses:
        error = check(loss, min(arguments.rows, 256), min(arguments.width, 512), arguments.vocab)
        print(f"{loss}: largest relative error {error:.1e} of bfloat16 against float32", flush=True)
    products = seconds_of_products(arguments.rows, arguments.width, arguments.vocab, arguments.repeats)
    print("products, ms: " + ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in products.items()), flush=True)
    table = [["loss", "head", "ms", "products_ms", "ratio", "tflops", "scratch_gb"]]
    for loss in arguments.losses:
        for head_trained in (False, True):
            table.append(run(loss, head_trained, arguments, products))
            print(*table[-1], flush=True)
    for i, row in enumerate(table):
        print("| " + " | ".join(row) + " |")
        if not i:
            print("|" + "---|" * len(row))


if __name__ == "__main__":
    main()
