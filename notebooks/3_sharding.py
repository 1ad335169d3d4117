# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Several devices and TPUs
#
# Training spreads weights, optimizer and batch over a mesh of devices with three axes. This notebook shows how each
# weight is laid out, that the losses are those of any other layout, and what the compiler adds to make it so. A CPU can
# pretend to be eight devices, so it runs anywhere; what a TPU changes comes at the end. Decoding on several devices is
# not there yet.

# %% [markdown]
# The next cell installs the package where it is missing, as on a fresh Colab machine (one to three minutes), with the
# JAX of that machine's chip. If Colab asks for a restart afterwards, restart and run the cells again.

# %%
import importlib.util
import subprocess
import sys
from glob import glob

if importlib.util.find_spec("idlm_jax") is None:
    is_tpu = glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")
    chip = "gpu," if glob("/dev/nvidia[0-9]*") else "tpu," if is_tpu else ""
    package = f"idlm-jax[{chip}gguf,train]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %% tags=["parameters"]
SIMULATED = 8  # devices that the CPU pretends to be; 0: the real devices of this machine
STEPS = 20

# %%
import re
from collections import Counter

import jax

# Before anything else asks JAX for its devices.
if SIMULATED:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SIMULATED)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import rich
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.table import Table

from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES, ShardingRules
from idlm_jax.backbone.weights import init_params, weight_table
from idlm_jax.config import ModelConfig
from idlm_jax.training.config import MeshSettings, OptimizerSettings, Stage, TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.params import ModelBuilder, flat_base
from idlm_jax.training.setup import make_mesh
from idlm_jax.training.step import init_state, make_optimizer, make_train_step, objective_of

print(f"{jax.device_count()} × {jax.devices()[0].device_kind}")

# %% [markdown]
# ## One table of rules
#
# Every dimension of a weight has a name (`vocab`, `embed`, `heads`, …), and one table says over which axis of the mesh
# a name is split:
#
# | axis | splits | use it for |
# |---|---|---|
# | `data` | rows of the batch; every device has all weights | models that fit |
# | `fsdp` | rows, and weights, gradients and optimizer with them | the first choice |
# | `tp` | heads, MLP and vocabulary | rows that do not fit; must divide the key heads |

# %%
small = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "initializer_range": 0.1,
        "mask_token_id": 511,
    }
)
devices = jax.device_count()
tp = max(size for size in (1, 2) if devices % size == 0)
settings = {
    "all data": MeshSettings(data=-1, fsdp=1),
    "all fsdp": MeshSettings(fsdp=-1),
    f"fsdp and tp {tp}": MeshSettings(fsdp=-1, tp=tp),
}
meshes = {name: make_mesh(setting, small) for name, setting in settings.items()}
for name, mesh in meshes.items():
    print(f"{name:<14}", " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))

mixed = meshes[f"fsdp and tp {tp}"]
table = Table("weight", "shape", "names", "split over", "shape on a device")
for weight in weight_table(small):
    if not weight.path.startswith("layers.1."):
        spec = ShardingRules().spec(weight, mixed)
        local = NamedSharding(mixed, spec).shard_shape(weight.shape)
        cells = weight.path, *(" × ".join(map(str, part)) for part in (weight.shape, weight.axes, spec, local))
        table.add_row(*cells)
rich.print(table)

# %% [markdown]
# The matrix of the first layer's queries, as it lies on the devices, over `fsdp` downwards and `tp` to the right:

# %%
builder = ModelBuilder(small, dtype="float32")
# On the host, from where each mesh gets its own copy.
params = jax.tree.map(np.asarray, flat_base(init_params(small, jax.random.key(0), jnp.float32)))
queries = jax.device_put(
    params["layers.self_attn.q_proj.kernel"], builder.shardings(mixed)["layers.self_attn.q_proj.kernel"]
)
jax.debug.visualize_array_sharding(queries[0])

# %% [markdown]
# ## The same losses on every mesh
#
# The program of a training step does not know the mesh: weights and batch are placed, and the compiler puts in what the
# placement needs. Below, full training of the small model on sequences it can learn (each token is the one before plus
# a step), from the same weights, on each mesh. `idlm train` does the same from `mesh: {data: 1, fsdp: -1, tp: 1}` in
# its YAML file, with data, checkpoints and resumption around it.

# %%
ROWS, LENGTH = 16, 64
rng = np.random.default_rng(0)
steps, firsts = rng.integers(1, 5, (2, STEPS, 1, ROWS, 1))
tokens = (firsts + steps * np.arange(LENGTH)) % 500
config = TrainConfig(
    model="",
    data=(),
    output="",
    mode="full",
    stages=(Stage(steps=STEPS, block_size=3),),
    optimizer=OptimizerSettings(learning_rate=1e-2),
    dtype="float32",
    remat="none",
)


def batch(step, mesh):
    """One step's rows, split over the devices: every row is one document, all of it learnt."""
    shape = (1, ROWS, LENGTH)  # parts of a step, rows, tokens
    arrays = {
        "tokens": tokens[step],
        "segment_ids": np.ones(shape),
        "positions": np.broadcast_to(np.arange(LENGTH), shape),
    }
    where = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))
    placed = {name: jax.device_put(array.astype(np.int32), where) for name, array in arrays.items()}
    return Batch.from_dict({**placed, "loss_mask": jax.device_put(np.ones(shape, bool), where)})


def run(mesh):
    """Losses of all steps, the compiled program, and bytes of weights and optimizer on the first device."""
    optimizer = make_optimizer(config)
    step = make_train_step(builder, objective_of(config, config.stages[0]), optimizer, seed=0)
    with jax.set_mesh(mesh):
        placement = builder.shardings(mesh)
        state = init_state({name: jax.device_put(array, placement[name]) for name, array in params.items()}, optimizer)
        size = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state))
        program = step.lower(state, {}, batch(0, mesh)).compile().as_text()
        losses = []
        for number in range(STEPS):
            state, result = step(state, {}, batch(number, mesh))
            losses.append(float(result.losses.total))
    return np.array(losses), program, size


runs = {name: run(mesh) for name, mesh in meshes.items()}

# %%
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
first = next(iter(runs.values()))[0]
table = Table(
    "mesh", "first loss", "last loss", "largest difference", "weights, optimizer", "collectives in the program"
)
for name, (losses, program, size) in runs.items():
    found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", program))
    text = ", ".join(f"{count} {kind}" for kind, count in found.items()) or "none"
    table.add_row(
        name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{abs(losses - first).max():.1e}", f"{size / 1e3:.0f} kB", text
    )
rich.print(table)

figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for (name, (losses, _, _)), color, width in zip(runs.items(), ("#c8d4e8", "#e08a1e", "black"), (9, 4, 1), strict=True):
    axis.plot(range(1, STEPS + 1), losses, color=color, linewidth=width, label=name)
axis.set(xlabel="step", ylabel="loss", ylim=(0, None), xticks=range(1, STEPS + 1))
axis.grid(alpha=0.25)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The curves lie on each other: what differs is the order of additions, so the last digits. What also differs is what a
# device holds and what it must exchange. `data` holds everything and exchanges little but sums of gradients
# (all-reduce); `fsdp` fetches weights just before they are used (all-gather); `tp` sums activations in every layer
# (more all-reduce), so it wants the fastest links.
#
# ## A model that needs it
#
# Qwen3-8B in training: float32 weights, gradients and the two moments of AdamW take 16 bytes a parameter. Shapes are
# enough to know what a device gets; nothing is allocated here. Activations come on top, and `idlm train CONFIG
# --dry-run` compiles the step to tell them.

# %%
qwen3_8b = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
)


def gigabytes(fsdp, tp=1):
    """Weights, gradients and optimizer on one device."""
    mesh = AbstractMesh((1, fsdp, tp), MESH_AXES)
    table = weight_table(qwen3_8b)
    shards = [NamedSharding(mesh, ShardingRules().spec(weight, mesh)).shard_shape(weight.shape) for weight in table]
    return 16 * sum(map(np.prod, shards)) / 1e9


sizes = (1, 2, 4, 8, 16, 32)
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
bars = axis.bar([str(size) for size in sizes], [gigabytes(size) for size in sizes], color="#4c72b0", width=0.6)
axis.bar_label(bars, fmt="%.1f", label_type="center", color="white")
for memory, name in ((16, "TPU v5e, 16 GB"), (32, "TPU v6e, 32 GB"), (80, "H100, 80 GB")):
    axis.axhline(memory, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
    axis.annotate(name, (len(sizes) - 0.5, memory), ha="right", va="bottom", fontsize=9, color="#555555")
axis.set(yscale="log", ylim=(2, 300), xlabel="devices along fsdp", ylabel="GB a device, without activations")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## On a TPU
#
# - Choose a TPU runtime and set `SIMULATED = 0` above; everything else stays. With one chip every axis is 1.
# - `dtype="bfloat16"` for computing (`float32` is computed in several passes and slow), trained weights stay float32.
# - `kernels: auto` takes the Pallas kernels for TPU, `kernels: xla` leaves them out. They are compiled for v5e and v6e
#   and checked in interpret mode in the project's tests, but have not run on a TPU yet:
#   [docs/kernels.md](../docs/kernels.md) says what is known.
# - A pod is several hosts. Each runs the same program, after `jax.distributed.initialize()`; the mesh then spans all
#   chips, and every host reads its own part of the data and writes its own part of the checkpoints:
#
# ```python
# import jax
# from pathlib import Path
# from idlm_jax.training.config import load_train_config
# from idlm_jax.training.loop import train
#
# jax.distributed.initialize()
# train(load_train_config(Path("train.yaml")))
# ```
#
# A checkpoint may be resumed on another mesh. More in
# [docs/training.md](../docs/training.md#several-devices).
