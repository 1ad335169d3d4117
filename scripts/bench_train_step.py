"""Time training steps of given shapes with random weights on one accelerator: tokens/s, memory, and MFU.

Run by hand on a GPU or TPU (a tiny shape runs on a CPU, to see that it works):

    python scripts/bench_train_step.py                                  # the baseline of docs/measurements.md
    python scripts/bench_train_step.py --cases tiny --steps 2           # a check on a CPU
    python scripts/bench_train_step.py --cases smollm2-gated --attention xla cudnn
    python scripts/bench_train_step.py --cases smollm2-gated --profile 30   # and the kernels that take longest
    python scripts/bench_train_step.py --cases qwen3-8b-gated --batch 16 --mesh none fsdp=2 tp=2

MFU counts useful work only (``idlm_jax.training.metrics.useful_flops``): products with weights and visible pairs of
attention, forward and backward, never what is computed again, over the chips' dense bf16 peak. Medians of steps that
are timed one by one, each ended by reading its loss. ``--mesh fsdp=2`` spreads a step over several devices; rows are
those of all, memory that of the fullest.
"""

import argparse
import dataclasses
import gzip
import json
import statistics
import tempfile
import time
import zlib
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idlm_jax.backbone.adapter import AdapterConfig
from idlm_jax.backbone.qwen3 import Remat
from idlm_jax.backbone.sharding import BATCH_AXES
from idlm_jax.cli.plans import parse_mesh
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.training.config import OptimizerSettings, Stage, TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.metrics import peak_flops, useful_flops
from idlm_jax.training.params import Flat, ModelBuilder, fresh_adapter, split_trained
from idlm_jax.training.setup import make_mesh
from idlm_jax.training.step import init_state, make_optimizer, make_train_step, objective_of

MODELS = Path(__file__).parent.parent / "configs" / "models"


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape to time."""

    model: str
    mode: str
    length: int
    batch: int
    rank: int = 0
    remat: str = "block"
    noisy_loss: str = "ce"
    accumulation: int = 1


CASES = {
    "tiny": Case("tiny", "full", 64, 2),
    "smollm2-gated": Case("smollm2-135m", "gated-lora", 1024, 64, rank=32, noisy_loss="tv"),
    "smollm2-full": Case("smollm2-135m", "full", 1024, 64),
    "qwen3-0.6b-full": Case("qwen3-0.6b", "full", 4096, 8),
    "qwen3-8b-gated": Case("qwen3-8b", "gated-lora", 4096, 2, rank=128, noisy_loss="tv"),
    "qwen3-14b-gated": Case("qwen3-14b", "gated-lora", 4096, 1, rank=128, noisy_loss="tv"),
    "qwen3-32b-gated": Case("qwen3-32b", "gated-lora", 4096, 1, rank=32, noisy_loss="tv"),
}
TINY = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mask_token_id": 255,
}


def model_config(name: str) -> ModelConfig:
    """A shape of configs/models with a mask token."""
    config = ModelConfig.from_hf(TINY if name == "tiny" else load_yaml(MODELS / f"{name}.yaml"))
    return config if config.mask_token_id is not None else config.replace(mask_token_id=16)


def random_params(builder: ModelBuilder, dtype: str, mesh: Mesh | None) -> Flat:
    """Stacked random weights, each made where it lies and a layer at a time: none is ever held twice."""
    placement = builder.shardings(mesh) if mesh else {}

    def make(name: str, shape: tuple[int, ...]) -> jax.Array:
        def noise(key: jax.Array, shape: tuple[int, ...] = shape) -> jax.Array:
            return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)

        def fill(key: jax.Array) -> jax.Array:
            if name.endswith("scale"):
                return jnp.ones(shape, dtype)
            if not name.startswith("layers."):
                return noise(key)
            return jax.lax.map(lambda key: noise(key, shape[1:]), jax.random.split(key, shape[0]))

        key = jax.random.key(zlib.crc32(name.encode()))
        return jax.jit(fill, out_shardings=placement.get(name))(key)

    params = {name: make(name, shape) for name, shape in builder.shapes().items() if not name.startswith("adapter.")}
    if builder.adapter:
        adapter = fresh_adapter(builder, params["embed_tokens.embedding"], jax.random.key(1))
        params |= {name: jax.device_put(array, placement.get(name)) for name, array in adapter.items()}
    return params


def longest_kernels(trace: Path, count: int, steps: int) -> list[str]:
    """Of a trace by the JAX profiler: the operations of the device that take longest, summed by name, a line each."""
    file = next(trace.rglob("perfetto_trace.json.gz"))
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    spent: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and names.get(event["pid"], "").startswith("/device:"):
            spent.setdefault(event["name"], []).append(event["dur"] / 1e3)
    rows = sorted(spent.items(), key=lambda row: -sum(row[1]))
    total = sum(sum(times) for times in spent.values()) / steps
    lines = [f"{total:10.2f} ms a step in all kernels ({sum(map(len, spent.values())) / steps:.0f} launches)"]
    for name, times in rows[:count]:
        lines.append(f"{sum(times) / steps:10.2f} ms {len(times) / steps:7.0f} times  {name[:100]}")
    return lines


def run(case: Case, attention: str, steps: int, mesh: Mesh | None, profile: int = 0) -> dict[str, object]:
    """Compile and time one case, ``mesh`` set; print the ``profile`` operations that take longest."""
    config = TrainConfig(
        model="",
        data=(),
        output="",
        mode=case.mode,
        stages=(Stage(steps + 2, 3, case.noisy_loss),),
        optimizer=OptimizerSettings(1e-5),
        length=case.length,
        batch_size=case.batch,
        accumulation=case.accumulation,
        remat=case.remat,
    )
    adapter = AdapterConfig(case.rank, 2 * case.rank) if case.rank else None
    builder = ModelBuilder(model_config(case.model), adapter, "bfloat16", Remat(case.remat))
    params = random_params(builder, "bfloat16" if case.rank else "float32", mesh)
    trained, frozen = split_trained(params, case.mode, (), "bfloat16")
    del params
    optimizer = make_optimizer(config)
    state = init_state(trained, optimizer)
    del trained
    objective = dataclasses.replace(objective_of(config, config.stages[0]), attention=attention)
    step = make_train_step(builder, objective, optimizer, seed=0)
    rng = np.random.default_rng(0)

    def batch() -> Batch:
        shape = (case.accumulation, case.batch // case.accumulation, case.length)
        rows = Batch(
            rng.integers(0, builder.config.vocab_size - 1, shape, np.int32),
            np.ones(shape, np.int32),
            np.broadcast_to(np.arange(case.length, dtype=np.int32), shape),
            np.ones(shape, bool),
        )
        return jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None)) if mesh else None)

    began = time.perf_counter()
    state, result = step(state, frozen, batch())
    first_loss = float(result.losses.total)
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(steps):
        data = jax.block_until_ready(batch())
        began = time.perf_counter()
        state, result = step(state, frozen, data)
        loss = float(result.losses.total)
        seconds.append(time.perf_counter() - began)
    if profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                for _ in range(2):
                    state, result = step(state, frozen, data)
                float(result.losses.total)
            print("\n".join(longest_kernels(Path(folder), profile, 2)), flush=True)
    median, tokens = statistics.median(seconds), case.batch * case.length
    flops = useful_flops(
        builder.config,
        case.mode,
        tokens=tokens,
        noisy_rows=int(result.losses.noisy_rows),
        length=case.length,
        block_size=3,
        rank=case.rank,
        clean_rows=int(result.losses.clean_rows),
        soft=case.noisy_loss != "ce",
    )
    devices = jax.devices()[: mesh.size if mesh else 1]
    peak = peak_flops(devices[0])
    in_use = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    return {
        "model": case.model,
        "mode": case.mode,
        "rank": case.rank,
        "attention": attention,
        "length": case.length,
        "batch": case.batch,
        "remat": case.remat,
        "seconds": round(median, 4),
        "tokens_per_second": round(tokens / median),
        "useful_tflops": round(flops / median / 1e12, 1),
        "mfu": None if peak is None else round(flops / median / peak / len(devices), 3),
        "peak_gb": round(max(in_use) / 1e9, 1),
        "first_step_seconds": round(compile_seconds, 1),
        "loss": [round(first_loss, 4), round(loss, 4)],
    }


def main() -> None:
    """Time the cases asked for and print a table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["qwen3-0.6b-full", "qwen3-8b-gated"])
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument(
        "--mesh", nargs="+", default=["none"], metavar="MESH", help="as of 'idlm plan'; one device: none"
    )
    parser.add_argument("--rank", type=int, help="of the adapter, instead of the case's")
    parser.add_argument("--batch", type=int, help="rows a step, instead of the case's")
    parser.add_argument("--remat", choices=[remat.value for remat in Remat], help="instead of the case's")
    parser.add_argument("--length", type=int, help="tokens a row, instead of the case's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", type=int, default=0, metavar="COUNT", help="print so many of the longest kernels")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    rows = []
    for name in arguments.cases:
        changes = {"batch": arguments.batch, "remat": arguments.remat}
        changes |= {"length": arguments.length, "rank": arguments.rank}
        case = dataclasses.replace(CASES[name], **{key: value for key, value in changes.items() if value is not None})
        for attention, shape in product(arguments.attention, arguments.mesh):
            mesh = None if shape == "none" else make_mesh(parse_mesh(shape), model_config(case.model))
            try:
                with jax.set_mesh(mesh) if mesh else nullcontext():
                    row = run(case, attention, arguments.steps, mesh, arguments.profile)
            except jax.errors.JaxRuntimeError as error:  # out of memory: say so and go on with the others
                row = {"model": case.model, "attention": attention, "error": str(error).splitlines()[0][:200]}
            rows.append({**row, "mesh": shape})
            print(json.dumps(rows[-1]), flush=True)
    keys = (
        "model",
        "mode",
        "rank",
        "mesh",
        "attention",
        "length",
        "batch",
        "remat",
        "seconds",
        "tokens_per_second",
        "useful_tflops",
    )
    keys += ("mfu", "peak_gb")
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, row.get("error", ""))) for key in keys) + " |")


if __name__ == "__main__":
    main()
