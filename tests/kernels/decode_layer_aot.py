"""Compile decode steps of Qwen3-8B for an H100 that need not be there; run by test_decode_layer.py.

``h100.txtpb`` describes the chip to XLA. Programs are compiled, not run.
"""

import os
import re
import subprocess
import sys
import tempfile
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

import pallas_kernels
from idlm_jax.backbone.adapter import Adapter, AdapterConfig, absorb, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.weights import Params, fuse_projections, init_params
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.decoding.cache import PAGE, Cache, init_cache
from idlm_jax.decoding.forward import forward
from pallas_kernels import dispatch
from pallas_kernels.decode_layer import api

ROOT = Path(__file__).parents[2]
LAYERS, SLOTS, RANK = 2, 1024, 128
# Requests and window rows: the standard layout of N = 4, its branch layout, and larger batches.
WINDOWS = [(1, 7), (1, 16), (32, 7), (64, 7)]
# The same caches in pages, whose table is the batch's.
PAGED_WINDOWS = [(1, 7), (64, 7)]
# Four products, attention with the merging of its parts, and four kernels.
LAUNCHES_A_LAYER = 10
LAUNCH = r"(?:fusion|custom-call|copy|copy-start|scatter|sort|reduce|transpose|dynamic-update-slice)\("
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
        return cache, jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, 8, body, (cache, tokens))


def weights_of(config: ModelConfig, lora: AdapterConfig | None) -> tuple[Params, Params | None]:
    """Parameters, and the second matrices of an adapter."""
    params = fuse_projections(init_params(config, jax.random.key(0), jnp.bfloat16))
    if lora is None:
        return params, None
    return params, absorb(config, params, init_adapter(config, lora, jax.random.key(1), jnp.bfloat16)).params


def launches(batch: int, rows: int, rank: int, layers: int, paged: bool) -> int:
    """Launches of a step, counted in the body of its loop; raises AssertionError where something is copied."""
    config = ModelConfig.from_hf(load_yaml(ROOT / "configs/models/qwen3-8b.yaml"))
    config = config.replace(mask_token_id=16, num_hidden_layers=layers)
    lora = AdapterConfig(rank, 2 * rank) if rank else None
    description = (ROOT / "idlm_jax/planning/h100.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    pages = SLOTS // PAGE
    sizes = (batch * pages + 1, PAGE) if paged else (batch, SLOTS)
    inputs = (
        jax.eval_shape(partial(weights_of, config, lora)),
        jax.eval_shape(lambda: init_cache(config, *sizes, jnp.bfloat16)),
        jax.ShapeDtypeStruct((batch, rows), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        *([jax.ShapeDtypeStruct((batch, pages), jnp.int32)] if paged else []),
    )
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), inputs)
    text = jax.jit(partial(step, config, lora), donate_argnums=1).lower(*placed).compile().as_text()
    name = re.findall(r"body=%?([\w.\-]+)", text)[-1]
    body = re.search(rf"^%?{re.escape(name)} \(.*?\n}}", text, re.MULTILINE | re.DOTALL)[0]
    lines = [line for line in body.splitlines() if re.search(LAUNCH, line)]
    copies = [line for line in lines if re.search(r" copy(-start)?\(|scatter|dynamic-update-slice", line)]
    assert not copies, copies
    assert 'custom_call_target="triton_kernel_call_ffi"' in body, "no CUDA graph takes untyped calls"
    assert 'custom_call_target="triton_kernel_call"' not in body, "no CUDA graph takes untyped calls"
    return len(lines)


def main() -> None:
    """Check how many launches a layer takes, and that no Triton kernel spills registers."""
    pretend_hopper()
    for (batch, rows), paged in [
        *((window, False) for window in WINDOWS),
        *((window, True) for window in PAGED_WINDOWS),
    ]:
        for rank in (0, RANK):
            a_layer = launches(batch, rows, rank, 2, paged) - launches(batch, rows, rank, 1, paged)
            kind = "pages" if paged else "dense"
            print(f"{batch} x {rows} rows, rank {rank}, {kind}: {a_layer} launches a layer", flush=True)
            assert a_layer <= LAUNCHES_A_LAYER, (batch, rows, rank, paged, a_layer)
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
