"""Bandwidth of window attention over dense and paged caches, beside the copy bandwidth of the device.

Run on an H100, by hand::

    python scripts/bench_decode_attention.py
    python scripts/bench_decode_attention.py --batch 1 --context 32768 --rows 7 --splits 8 16 24 32

Counted are the bytes of keys and values that the requests need, once; the copy bandwidth counts bytes read and written.
The calls are timed inside one program, each fed the output of the one before, as in the layers of a decode step: over
so many caches that none is still in the L2 cache when its turn comes again. Every case is first compared with the
reference in float32. On a CPU the script only makes that comparison, interpreted and tiny.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.decode_attention import gpu, reference

# Far more than the 50 MB of the L2 cache.
CACHE_BYTES = 512 * 2**20
# Largest error against float32, over the scale of the result.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    batch: tuple[int, ...] = (1, 32, 64)
    # Tokens in the cache before the window.
    context: tuple[int, ...] = (1024, 4096)
    # Window rows a request.
    rows: tuple[int, ...] = (7,)
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    # Slots of a page; 0 is the dense cache.
    page: tuple[int, ...] = (0, 64)
    # Parts of the keys of a request; 0 is the kernel's own choice.
    splits: tuple[int, ...] = (0,)
    # Lengths from an eighth of the context to all of it, instead of all of it.
    ragged: bool = False
    # Skip cases whose keys and values take more memory than this.
    max_gib: float = 24
    repeats: int = 9


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    batch: int
    context: int
    rows: int
    page: int
    splits: int


def arrays(case: Case, settings: Settings, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Queries; keys, values and for pages their table; prefix lengths."""
    q_key, k_key, v_key, page_key = jax.random.split(key, 4)
    slots = math.ceil((case.context + case.rows) / 128) * 128
    lengths = jnp.full(case.batch, case.context)
    if settings.ragged:
        lengths = jnp.linspace(case.context // 8, case.context, case.batch).astype(jnp.int32)
    q = jax.random.normal(q_key, (case.batch, case.rows, settings.heads, settings.head_dim), jnp.bfloat16)
    page = case.page or slots
    shape = (case.batch * slots // page, settings.kv_heads, page, settings.head_dim)
    cache = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in (k_key, v_key))
    if case.page:
        cache += (jax.random.permutation(page_key, shape[0]).reshape(case.batch, -1).astype(jnp.int32),)
    return q, cache, lengths


def functions(case: Case) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The kernel and the reference."""
    if case.page:
        return partial(gpu.paged_window_attention, splits=case.splits or None), reference.paged_window_attention
    return partial(gpu.window_attention, splits=case.splits or None), reference.window_attention


def error(case: Case, settings: Settings) -> float:
    """Largest error of the kernel over the scale of the reference in float32, on the first requests."""
    q, cache, lengths = arrays(case, settings, jax.random.key(1))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((case.rows, case.rows), bool)), (case.batch, case.rows, case.rows))
    kernel, exact = functions(case)
    on_cpu = jax.default_backend() == "cpu"
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()) if on_cpu else nullcontext():
        ours = jax.block_until_ready(kernel(q, *cache, lengths, mask))
    few = slice(0, 2)
    if not case.page:
        cache = tuple(array[few] for array in cache)
    else:
        pages = cache[2][few]
        cache = (*(array[pages.ravel()] for array in cache[:2]), jnp.arange(pages.size).reshape(pages.shape))
    cache = tuple(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in cache)
    wanted = jax.jit(exact)(q[few].astype(jnp.float32), *cache, lengths[few], mask[few])
    return float(jnp.abs(ours[few] - wanted).max() / wanted.std())


def seconds(attend: Callable[..., jax.Array], case: Case, settings: Settings) -> float:
    """Median time of one call."""
    needed = case_bytes(case, settings)
    layers = max(1, min(36, math.ceil(CACHE_BYTES / needed)))
    q, _, lengths = arrays(case, settings, jax.random.key(0))
    caches = [arrays(case, settings, jax.random.key(layer))[1] for layer in range(layers)]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((case.rows, case.rows), bool)), (case.batch, case.rows, case.rows))
    rounds = max(1, math.ceil(72 / layers))

    @jax.jit
    def run(q: jax.Array, caches: list) -> jax.Array:
        def body(_: int, q: jax.Array) -> jax.Array:
            for cache in caches:
                q = attend(q, *cache, lengths, mask)
            return q

        return jax.lax.fori_loop(0, rounds, body, q)

    return median_seconds(lambda: run(q, caches), settings.repeats) / (rounds * layers)


def median_seconds(call: Callable[[], jax.Array], repeats: int) -> float:
    """Median wall time of a call, after one to compile."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def case_bytes(case: Case, settings: Settings) -> float:
    """Bytes of the keys and values that the requests need."""
    context = case.context * (9 / 16 if settings.ragged else 1)
    return 4 * case.batch * (context + case.rows) * settings.kv_heads * settings.head_dim


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    x, inner = jnp.ones(2**30, jnp.bfloat16), 10
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, inner, lambda _, y: -y, x))
    return 2 * x.nbytes * inner / median_seconds(lambda: copy(x), 5)


def main(settings: Settings) -> None:
    """Check every case, then time them and print a table."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        settings = replace(
            settings, batch=(2,), context=(150,), rows=(3,), page=(0, 64), heads=4, kv_heads=2, head_dim=64
        )
    every = product(settings.batch, settings.context, settings.rows, settings.page, settings.splits)
    cases = [
        case for case in (Case(*values) for values in every) if case_bytes(case, settings) < settings.max_gib * 2**30
    ]
    for case in cases:
        wrong = error(case, settings)
        print(f"{case}: error {wrong:.4f}", flush=True)
        if not wrong <= TOLERANCE:
            raise SystemExit(f"{case}: error {wrong} is more than {TOLERANCE}")
    if on_cpu:
        return
    bandwidth = copy_bandwidth()
    columns = ("batch", "context", "rows", "cache", "splits", "µs", "TB/s", "of copy", "xla µs")
    title = f"{settings.heads}/{settings.kv_heads} heads, head_dim {settings.head_dim}, {jax.devices()[0].device_kind}"
    table = Table(*columns, title=f"{title}, copy {bandwidth / 1e12:.2f} TB/s{', ragged' if settings.ragged else ''}")
    for case in cases:
        kernel, plain = functions(case)
        ours, xla = (seconds(function, case, settings) for function in (kernel, plain))
        rate = case_bytes(case, settings) / ours
        kind = f"pages of {case.page}" if case.page else "dense"
        sizes = (str(case.batch), str(case.context), str(case.rows), kind, str(case.splits or "auto"))
        table.add_row(*sizes, f"{1e6 * ours:.1f}", f"{rate / 1e12:.2f}", f"{rate / bandwidth:.0%}", f"{1e6 * xla:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
