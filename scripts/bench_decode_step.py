"""Median time of one decode step at any Qwen3 shape, beside the floor that bytes and FLOPs set.

Run on an accelerator, by hand::

    python scripts/bench_decode_step.py --model configs/models/qwen3-8b.yaml --batch 1 --rows 1 7 16 --context 512

Weights are random. A step is one forward pass of W window rows a request over a cache that holds ``context`` tokens,
language-model head included, sampling left out: 1 row is AR, 2N - 1 rows the standard layout, N² the branch layout. The
floor is the larger of bytes over bandwidth and FLOPs over peak, both measured here: a large copy and a large bf16
matrix product. Each step is timed inside one program of many steps that feed each other, so launches are queued as in
decoding; the cache is donated and updated in place.

``--kernels auto xla`` measures with and without kernels (``auto`` takes them wherever they can run, whatever the
default is), ``--adapter-rank 0 128`` without and with a gated LoRA on all projections, which acts on the rows after the
first ``--adapter-from``. The floor counts its matrices. ``--cache dense paged`` compares places of a request's own with
pages scattered over memory. ``--tp 2`` splits weights, heads and vocabulary over two devices; the floors are then those
of a device with its part of all, what it sends to the others left out.
"""

import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from bench_train_step import longest_kernels
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Table

import pallas_kernels
from idlm_jax.backbone.adapter import Adapter, AdapterConfig, init_adapter
from idlm_jax.backbone.layers import split_axes
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import MESH_AXES, adapter_sharding, weight_sharding
from idlm_jax.backbone.weights import init_params
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.decoding.cache import PAGE, Cache, bucket, init_cache
from idlm_jax.decoding.forward import forward, prepare
from idlm_jax.evaluation.step_cost import Shape, demand


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    # Model shape: a YAML file with Hugging Face keys.
    model: Path = Path("configs/models/qwen3-8b.yaml")
    batch: tuple[int, ...] = (1,)
    # Window rows a request.
    rows: tuple[int, ...] = (1, 7, 16)
    # Tokens already in the cache.
    context: tuple[int, ...] = (512,)
    # "auto", "xla" or both.
    kernels: tuple[str, ...] = ("auto",)
    # "dense", "paged" or both.
    cache: tuple[Literal["dense", "paged"], ...] = ("dense",)
    # Ranks of the gated LoRA; 0 is none.
    adapter_rank: tuple[int, ...] = (0,)
    # First window row on which it acts.
    adapter_from: int = 4
    dtype: str = "bfloat16"
    # Devices to split the model over.
    tp: int = 1
    # Steps a program runs, and how often it is timed.
    steps: int = 20
    repeats: int = 7
    # Print so many of the longest kernels of each case.
    profile: int = 0
    # Print one JSON line a case instead of a table: what ``idlm bench analyse --costs`` reads.
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def split(x: jax.Array) -> PartitionSpec | None:
    """How an array is split over the mesh that is set, None without one."""
    axes = split_axes(x)
    return None if axes is None else PartitionSpec(*axes)


def decode_steps(
    model: Qwen3,
    cache: Cache,
    tokens: jax.Array,
    length: jax.Array,
    pages: jax.Array | None,
    steps: int,
    adapter_from: int | None,
    kernels: str,
) -> tuple[Cache, jax.Array]:
    """``steps`` forward passes over the same slots, each fed the argmax of the one before."""
    rows = tokens.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool)), (tokens.shape[0], rows, rows))
    positions = length[:, None] + jnp.arange(rows)

    def body(_: int, carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, tokens = carry
        hidden, cache = forward(model, tokens, positions, length, mask, cache, adapter_from, kernels, pages)
        logits = model.logits(hidden)
        logits = logits if split(logits) is None else jax.reshard(logits, PartitionSpec())
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, steps, body, (cache, tokens))


def launches(program: str) -> int:
    """Kernels that one step launches: what the body of the (outermost) loop of a compiled program calls."""
    body = re.search(rf"^%?{re.escape(re.findall(r'body=%?([\w.\-]+)', program)[-1])} \(.*?\n}}", program, re.M | re.S)
    names = "fusion custom-call copy copy-start scatter sort reduce transpose dynamic-update-slice dot"
    operation = rf" (?:{'|'.join(names.split())}|(?:all-reduce|all-gather)(?:-start)?|all-to-all)\("
    return 0 if body is None else len(re.findall(operation, body[0]))


def median_seconds(call: partial, repeats: int) -> float:
    """Median wall time of a call that blocks until its result is there."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Measured copy bandwidth (bytes/s, read + written) and bf16 matrix-product rate (FLOP/s) of the first device."""
    on_cpu = jax.default_backend() == "cpu"
    elements, side, inner = (2**24, 1024, 2) if on_cpu else (2**30, 8192, 10)
    x = jax.random.normal(jax.random.key(0), (elements,), jnp.bfloat16)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, inner, lambda _, y: -y, x))
    a = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16) / side**0.5
    product = jax.jit(lambda a: jax.lax.fori_loop(0, inner, lambda _, y: y @ a, a))
    for warm_up in (copy, product):
        jax.block_until_ready(warm_up(x if warm_up is copy else a))
    copy_seconds = median_seconds(partial(lambda: jax.block_until_ready(copy(x))), 5) / inner
    product_seconds = median_seconds(partial(lambda: jax.block_until_ready(product(a))), 5) / inner
    return 2 * x.nbytes / copy_seconds, 2 * side**3 / product_seconds


def make_model(config: ModelConfig, dtype: jnp.dtype, rank: int) -> Qwen3:
    """A random model as ``idlm_jax.load`` would prepare it, over the mesh if one is set."""
    mesh, adapter = jax.sharding.get_mesh(), None
    params = init_params(config, jax.random.key(0), dtype, None if mesh.empty else weight_sharding(mesh))
    if rank:
        adapter = init_adapter(config, AdapterConfig(rank, 2 * rank), jax.random.key(1), dtype, b_scale=0.01)
        if not mesh.empty:
            placed = jax.device_put(adapter.params, adapter_sharding(config, adapter, mesh))
            adapter = Adapter(adapter.config, placed)
    return Qwen3(config, *prepare(config, params, adapter))


def measure(
    model: Qwen3,
    batch: int,
    rows: int,
    context: int,
    adapter_from: int | None,
    kernels: str,
    paged: bool,
    settings: Settings,
) -> dict[str, float]:
    """Compile and time one case; seconds, and launches a step."""
    config, slots, pages = model.config, bucket(context + rows), None
    if paged:
        pages = 1 + jax.random.permutation(jax.random.key(4), batch * -(-slots // PAGE)).reshape(batch, -1)
    sizes = (batch, slots) if pages is None else (pages.size + 1, PAGE)
    cache = init_cache(config, *sizes, model.dtype)
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape, x.dtype, out_sharding=split(x)), cache)
    tokens = jax.random.randint(jax.random.key(3), (batch, rows), 0, config.vocab_size)
    length = jnp.full((batch,), context)
    jitted = jax.jit(decode_steps, static_argnames=("steps", "adapter_from", "kernels"), donate_argnames="cache")
    began = time.perf_counter()
    compiled = jitted.lower(model, cache, tokens, length, pages, settings.steps, adapter_from, kernels).compile()
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(settings.repeats + 1):
        began = time.perf_counter()
        cache, tokens = jax.block_until_ready(compiled(model, cache, tokens, length, pages))
        times.append((time.perf_counter() - began) / settings.steps)
    if settings.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                cache, tokens = jax.block_until_ready(compiled(model, cache, tokens, length, pages))
            lines = longest_kernels(Path(folder), settings.profile, settings.steps)
        print("\n".join(lines), file=sys.stderr, flush=True)
    return {
        "step": statistics.median(times[1:]),
        "compile": compile_seconds,
        "launches": launches(compiled.as_text()),
    }


def main(settings: Settings) -> None:
    """Measure every case and print a table."""
    pallas_kernels.BY_DEFAULT = True
    config = ModelConfig.from_hf(load_yaml(settings.model), str(settings.model))
    dtype = jnp.dtype(settings.dtype)
    bandwidth, peak = ceilings()
    if settings.tp > 1:
        jax.set_mesh(jax.make_mesh((1, 1, settings.tp), MESH_AXES, devices=jax.devices()[: settings.tp]))
    cases = []
    for rank in settings.adapter_rank:
        model = make_model(config, dtype, rank)
        given = product(settings.batch, settings.context, settings.rows, settings.kernels, settings.cache)
        for batch, context, rows, kernels, cache in given:
            needed_bytes, flops = demand(config, Shape(batch, rows, context, rank), dtype)
            adapter_from = settings.adapter_from if rank else None
            case = measure(model, batch, rows, context, adapter_from, kernels, cache == "paged", settings)
            floors = {"byte_floor": needed_bytes / bandwidth / settings.tp, "flop_floor": flops / peak / settings.tp}
            names = {"batch": batch, "rows": rows, "context": context, "rank": rank, "kernels": kernels, "cache": cache}
            names["tp"] = settings.tp
            cases.append({**names, **case, **floors})
            print(cases[-1], file=sys.stderr, flush=True)
        del model
    device = jax.devices()[0].device_kind
    head = {"device": device, "jax": jax.__version__, "bandwidth": bandwidth, "peak": peak, "dtype": dtype.name}
    if settings.json:
        print("\n".join(json.dumps({**head, **case}) for case in cases))
        return
    title = f"{settings.model.stem}, {dtype.name}, {settings.tp} x {device}, jax {jax.__version__}"
    print(f"measured ceilings: copy {bandwidth / 1e12:.2f} TB/s, matrix product {peak / 1e12:.0f} TFLOP/s")
    names = ("batch", "rows", "context", "rank", "kernels", "cache", "launches")
    columns = (*names, "step ms", "byte floor ms", "FLOP floor ms", "step / floor", "compile s")
    table = Table(*columns, title=title)
    for case in cases:
        ratio = case["step"] / max(case["byte_floor"], case["flop_floor"])
        milliseconds = [f"{1e3 * case[key]:.2f}" for key in ("step", "byte_floor", "flop_floor")]
        sizes = [str(case[key]) for key in names]
        table.add_row(*sizes, *milliseconds, f"{ratio:.2f}", f"{case['compile']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
