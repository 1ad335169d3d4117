"""Train a few steps on one device and on meshes of 8 simulated ones, and compare; run by test_mesh.py."""

import sys
from dataclasses import replace

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES  # noqa: E402
from idlm_jax.backbone.weights import init_params  # noqa: E402
from idlm_jax.training.config import OptimizerSettings, Stage, TrainConfig  # noqa: E402
from idlm_jax.training.params import Flat, ModelBuilder, flat_adapter, flat_base, split_trained  # noqa: E402
from idlm_jax.training.step import TrainState, init_state, make_optimizer, make_train_step, objective_of  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402
from pallas_kernels.range_attention import cudnn, gpu, reference  # noqa: E402
from tests.decoding.support import tiny_adapter, tiny_config  # noqa: E402
from tests.training.support import random_batch  # noqa: E402

STEPS, VOCAB = 2, 64
# Mode, stage and meshes (data, fsdp, tp): every mode on a mixture, and the paper's mode on every pure mesh too.
CASES = {
    "full": (Stage(STEPS, 2, "ce", "auto", "aligned"), [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)]),
    "gated-lora": (Stage(STEPS, 3, "tv", starts="random"), [(2, 2, 2), (1, 4, 2)]),
    "lora": (Stage(STEPS, 3, "kl", 0.2, "random"), [(2, 4, 1)]),
    "ar": (Stage(STEPS), [(4, 1, 2)]),
}


def run(
    mode: str, stage: Stage, shape: tuple[int, int, int] | None, attention: str = "auto"
) -> tuple[list[float], Flat, TrainState]:
    """Losses and weights after some steps; no mesh at all for None."""
    config = TrainConfig(
        "",
        (),
        "",
        mode=mode,
        stages=(stage,),
        # A large epsilon keeps Adam from magnifying the rounding of gradients that are almost zero.
        optimizer=OptimizerSettings(1e-2, epsilon=1e-3, weight_decay=0.1),
        dtype="float32",
        batch_size=16,
        accumulation=2,
    )
    model = tiny_config(vocab_size=VOCAB)
    adapter = tiny_adapter(model) if mode.endswith("lora") else None
    builder = ModelBuilder(model, adapter.config if adapter else None, "float32")
    params = flat_base(init_params(model, jax.random.key(0), jnp.dtype(jnp.float32)))
    params |= flat_adapter(adapter.params) if adapter else {}
    batch = jax.tree.map(lambda array: array.reshape(2, 8, -1), random_batch(16, 24, VOCAB - 1))
    optimizer = make_optimizer(config)

    def steps(params: Flat, batch: object) -> tuple[list[float], Flat, TrainState]:
        trained, frozen = split_trained(params, mode, (), "float32")
        state = init_state(trained, optimizer)
        objective = replace(objective_of(config, stage), attention=attention)
        step = make_train_step(builder, objective, optimizer, seed=3)
        losses = []
        for _ in range(STEPS):
            state, result = step(state, frozen, batch)
            losses.append(float(result.losses.total))
        return losses, state.params, state

    if shape is None:
        return steps(params, batch)
    count = int(np.prod(shape))
    mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        placement = builder.shardings(mesh)
        params = {name: jax.device_put(array, placement[name]) for name, array in params.items()}
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None)))
        losses, after, state = steps(params, batch)
        for name, array in after.items():
            moments = [
                leaf[name]
                for leaf in jax.tree.leaves(state.optimizer, is_leaf=lambda x: isinstance(x, dict))
                if isinstance(leaf, dict)
            ]
            assert len(moments) == 2, "Adam's two moments"
            for moment in moments:
                assert moment.sharding.spec == array.sharding.spec == placement[name].spec, name
        return losses, after, state


def check_wrapped_kernels() -> None:
    """A kernel that works on its own shard, in the place of a GPU's, trains like the reference on the whole."""
    stage, _ = CASES["gated-lora"]
    losses, _, _ = run("gated-lora", stage, None)
    cudnn.range_attention = gpu.range_attention = reference.range_attention
    dispatch.device, gpu.refusal = lambda: "gpu 9.0", lambda *_: None
    for shape, attention in (((2, 1, 1), "cudnn"), ((2, 2, 2), "pallas")):
        wrapped_losses, _, _ = run("gated-lora", stage, shape, attention=attention)
        np.testing.assert_allclose(wrapped_losses, losses, rtol=2e-6, err_msg=f"wrapped {shape}")
        print("wrapped", shape, "ok", flush=True)


def main() -> None:
    """Compare the modes named on the command line, or for ``wrapped`` a kernel under shard_map."""
    if sys.argv[1:] == ["wrapped"]:
        check_wrapped_kernels()
        return
    for mode in sys.argv[1:]:
        stage, meshes = CASES[mode]
        losses, params, _ = run(mode, stage, None)
        assert losses[1] < losses[0], losses
        for shape in meshes:
            sharded_losses, sharded, _ = run(mode, stage, shape)
            np.testing.assert_allclose(sharded_losses, losses, rtol=2e-6, err_msg=f"{mode} {shape}")
            for name, array in params.items():
                np.testing.assert_allclose(sharded[name], array, rtol=1e-5, atol=2e-6, err_msg=f"{mode} {shape} {name}")
            print(mode, shape, "ok", flush=True)


if __name__ == "__main__":
    main()
