"""Compile decode steps of Qwen3-8B for H100s that need not be there; run by test_decode_layer.py.

``h100.txtpb`` describes the chip to XLA. Programs are compiled, not run.
"""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp
import jax_triton
import triton
from jax._src.lib import gpu_triton
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import pallas_kernels
from idlm_jax.backbone.adapter import Adapter, AdapterConfig
from idlm_jax.backbone.layers import split_axes
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import MESH_AXES
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.decoding.cache import PAGE, Cache, init_cache
from idlm_jax.decoding.forward import forward
from idlm_jax.planning.decoding import _placed, _weights
from pallas_kernels import dispatch
from pallas_kernels.decode_layer import api

ROOT = Path(__file__).parents[2]
LAYERS, SLOTS, RANK = 2, 1024, 128
# Requests and window rows: AR, the standard layout of N = 4, its branch layout, and larger batches.
WINDOWS = [(1, 1), (1, 7), (1, 16), (32, 7), (64, 7)]
# The same caches in pages, whose table is the batch's.
PAGED_WINDOWS = [(1, 7), (64, 7)]
# Window, pages or not, and devices.
MESH_CASES = [((1, 1), False, 2), ((1, 7), False, 2), ((64, 7), True, 2)]
# Four products, attention with the merging of its parts, and four kernels; on a mesh the summands of two products are
# added up on each device and then over all.
LAUNCHES_A_LAYER = {1: 10, 2: 14}
LAUNCH = r"(?:fusion|custom-call|copy|copy-start|scatter|sort|reduce|all-reduce-start|transpose|dynamic-update-slice)\("
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

# Name and bytes of shared memory of each, by its PTX.
kernels: dict[str, tuple[str, int]] = {}


def pretend_hopper() -> None:
    """Choose kernels as on a Hopper GPU, and keep the PTX of every Triton kernel."""
    api._obstacle = lambda: None
    dispatch.device = lambda: "gpu 9.0"
    pallas_kernels.BY_DEFAULT = True

    def kernel(name, warps, ctas, shared, ptx, *rest):
        kernels[ptx] = name, shared
        return gpu_triton.TritonKernel(name, warps, ctas, shared, ptx, *rest)

    of_library = {name: getattr(gpu_triton, name) for name in dir(gpu_triton) if not name.startswith("__")}
    of_library |= {"get_compute_capability": lambda _: 90, "TritonKernel": kernel}
    jax_triton.triton_lib.triton_kernel_call_lib = SimpleNamespace(**of_library)


def step(config: ModelConfig, lora: AdapterConfig | None, weights: tuple, cache: Cache, tokens, length, pages=None):
    """Some forward passes, each fed the argmax of the one before, as in scripts/bench_decode_step.py."""
    params, adapter = weights
    model = Qwen3(config, params, Adapter(lora, adapter) if lora else None)
    batch, rows = tokens.shape
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool)), (batch, rows, rows))
    positions = length[:, None] + jnp.arange(rows)

    def body(_, carry):
        cache, tokens = carry
        hidden, cache = forward(model, tokens, positions, length, mask, cache, 4 if lora else None, pages_BN=pages)
        logits = model.logits(hidden)
        if split_axes(logits) is not None:
            logits = jax.reshard(logits, PartitionSpec())
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, 8, body, (cache, tokens))


def launches(batch: int, rows: int, rank: int, layers: int, paged: bool, tp: int) -> int:
    """Launches of a step, counted in the body of its loop; raises AssertionError where weights or caches are moved."""
    config = ModelConfig.from_hf(load_yaml(ROOT / "configs/models/qwen3-8b.yaml"))
    config = config.replace(mask_token_id=16, num_hidden_layers=layers)
    lora = AdapterConfig(rank, 2 * rank) if rank else None
    description = (ROOT / "idlm_jax/planning/h100.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x1x{tp}")
    mesh, everywhere = None, SingleDeviceSharding(topology.devices[0])
    if tp > 1:
        mesh = jax.make_mesh((1, 1, tp), MESH_AXES, devices=topology.devices)
        everywhere = NamedSharding(mesh, PartitionSpec())
    pages = SLOTS // PAGE
    sizes = (batch * pages + 1, PAGE) if paged else (batch, SLOTS)

    def others() -> tuple[jax.Array, ...]:
        table = [jnp.zeros((batch, pages), jnp.int32)] if paged else []
        return jnp.zeros((batch, rows), jnp.int32), jnp.zeros((batch,), jnp.int32), *table

    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        weights = _weights(config, rank, everywhere, mesh)
        cache = _placed(everywhere, lambda: init_cache(config, *sizes, jnp.bfloat16))
        lowered = jax.jit(partial(step, config, lora), donate_argnums=1).lower(
            weights, cache, *_placed(everywhere, others)
        )
    text = lowered.compile().as_text()
    name = re.findall(r"body=%?([\w.\-]+)", text)[-1]
    body = re.search(rf"^%?{re.escape(name)} \(.*?\n}}", text, re.MULTILINE | re.DOTALL)[0]
    lines = [line for line in body.splitlines() if re.search(LAUNCH, line)]
    copies = [line for line in lines if re.search(r" copy(-start)?\(|scatter|dynamic-update-slice", line)]
    assert not copies, copies
    gathered = re.findall(rf"\[{config.vocab_size},{config.hidden_size}\]\S* all-gather.*", body)
    assert not gathered, gathered
    assert 'custom_call_target="triton_kernel_call_ffi"' in body, "no CUDA graph takes untyped calls"
    assert 'custom_call_target="triton_kernel_call"' not in body, "no CUDA graph takes untyped calls"
    return len(lines)


def main() -> None:
    """Check how many launches a layer takes, and that no Triton kernel spills registers."""
    pretend_hopper()
    cases = [(window, False, 1) for window in WINDOWS] + [(window, True, 1) for window in PAGED_WINDOWS]
    for (batch, rows), paged, tp in [*cases, *MESH_CASES]:
        for rank in (0, RANK):
            few, more = (launches(batch, rows, rank, layers, paged, tp) for layers in (1, 2))
            kind = "pages" if paged else "dense"
            print(f"{batch} x {rows} rows, rank {rank}, {kind}, tp {tp}: {more - few} launches a layer", flush=True)
            assert more - few <= LAUNCHES_A_LAYER[tp], (batch, rows, rank, paged, tp, more - few)
    for ptx, (name, shared) in kernels.items():
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            command = [PTXAS, "-arch=sm_90a", "-v", file.name, "-o", os.devnull]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        numbers = (re.search(pattern, told)[0] for pattern in (r"Used \d+ registers", r"\d+ bytes spill stores"))
        print(name, *numbers, f"{shared} bytes shared")
        assert "0 bytes spill stores, 0 bytes spill loads" in told, (name, told)


if __name__ == "__main__":
    sys.exit(main())
