"""Train a few steps on one device and on meshes of 8 simulated ones, and compare; run by test_mesh.py.

The partitioner of XLA has given wrong gradients beside right losses, so gradients are compared themselves, before the
optimizer makes them all alike.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from jaxtyping import Array  # noqa: E402

from idlm_jax.backbone import layers  # noqa: E402
from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES  # noqa: E402
from idlm_jax.backbone.weights import init_params  # noqa: E402
from idlm_jax.training.config import OptimizerSettings, Stage, TrainConfig  # noqa: E402
from idlm_jax.training.params import Flat, ModelBuilder, flat_adapter, flat_base, split_trained  # noqa: E402
from idlm_jax.training.step import init_state, make_optimizer, make_train_step, objective_of  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402
from pallas_kernels.range_attention import cudnn, gpu  # noqa: E402
from pallas_kernels.range_attention import reference as range_attention  # noqa: E402
from tests.decoding.support import tiny_adapter, tiny_config  # noqa: E402
from tests.training.support import close, random_batch  # noqa: E402

STEPS, VOCAB, PARTS = 2, 64, 2
STAGES = {
    "full": Stage(STEPS, 2, "ce", "auto", "aligned"),
    "gated-lora": Stage(STEPS, 3, "tv", starts="random"),
    "lora": Stage(STEPS, 3, "kl", 0.2, "random"),
    "ar": Stage(STEPS),
}
# Every (data, fsdp, tp) of 8 devices.
MESHES = [(data, fsdp, 8 // data // fsdp) for data in (1, 2, 4, 8) for fsdp in (1, 2, 4, 8) if data * fsdp <= 8]
# What 8 devices can split: key heads with two heads of queries each, vocabulary, MLP and residual stream.
MODEL = tiny_config(vocab_size=VOCAB, num_attention_heads=16, num_key_value_heads=8, head_dim=4)


@dataclass(frozen=True)
class Run:
    """What some steps gave."""

    losses: list[float]
    # Of the first step, the mean of its parts, as the optimizer is given it.
    gradient: dict[str, np.ndarray]
    params: dict[str, np.ndarray]


def train(mode: str, shape: tuple[int, int, int] | None, attention: str = "auto") -> Run:
    """Some steps on a mesh of this shape, or without any mesh for None."""
    config = TrainConfig(
        "",
        (),
        "",
        mode=mode,
        stages=(STAGES[mode],),
        # A large epsilon keeps Adam from magnifying the rounding of gradients that are almost zero.
        optimizer=OptimizerSettings(1e-2, epsilon=1e-3, weight_decay=0.1),
        dtype="float32",
        batch_size=8 * PARTS,
        accumulation=PARTS,
    )
    adapter = tiny_adapter(MODEL) if mode.endswith("lora") else None
    builder = ModelBuilder(MODEL, adapter.config if adapter else None, "float32")
    params = flat_base(init_params(MODEL, jax.random.key(0), jnp.dtype(jnp.float32)))
    params |= flat_adapter(adapter.params) if adapter else {}
    batch = jax.tree.map(lambda array: array.reshape(PARTS, 8, -1), random_batch(8 * PARTS, 24, VOCAB - 1))
    # Without decay a trace is the last gradient.
    optimizer = optax.chain(optax.trace(0.0), make_optimizer(config))

    def steps(params: Flat, batch: object) -> Run:
        trained, frozen = split_trained(params, mode, (), "float32")
        places = {name: array.sharding for name, array in trained.items()}
        state = init_state(trained, optimizer)
        objective = replace(objective_of(config, STAGES[mode]), attention=attention)
        step = make_train_step(builder, objective, optimizer, seed=3)
        losses, gradients = [], []
        for _ in range(STEPS):
            state, result = step(state, frozen, batch)
            losses.append(float(result.losses.total))
            gradients.append(fetch(state.optimizer[0].trace))
        for tree in (state.params, *like_params(state.optimizer)):
            for name, array in tree.items():
                assert array.sharding.is_equivalent_to(places[name], array.ndim), f"{name} lies {array.sharding}"
        return Run(losses, gradients[0], fetch(state.params))

    if shape is None:
        return steps(params, batch)
    mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        placement = builder.shardings(mesh)
        params = {name: jax.device_put(array, placement[name]) for name, array in params.items()}
        return steps(params, jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))))


def like_params(optimizer: optax.OptState) -> list[Flat]:
    """What the optimizer keeps a number a weight for: the gradient and Adam's two moments."""
    leaves = jax.tree.leaves(optimizer, is_leaf=lambda node: isinstance(node, dict))
    kept = [leaf for leaf in leaves if isinstance(leaf, dict)]
    assert len(kept) == 3
    return kept


def fetch(arrays: Flat) -> dict[str, np.ndarray]:
    """The arrays on the host; every device that has a part of one must have the same."""
    values = jax.device_get(arrays)
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[name][shard.index], err_msg=f"{name} on {shard.device}")
    return values


def assert_same(ours: Run, reference: Run, where: str) -> None:
    """Compare losses, the gradient of each weight to a share of its largest entry, and the weights after all steps."""
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=2e-6, err_msg=where)
    assert ours.gradient.keys() == reference.gradient.keys()
    wrong = [name for name, gradient in reference.gradient.items() if not close(ours.gradient[name], gradient)]
    assert not wrong, f"{where}: other gradients of {', '.join(wrong)}"
    for name, array in reference.params.items():
        np.testing.assert_allclose(ours.params[name], array, rtol=1e-5, atol=2e-6, err_msg=f"{where} {name}")


def check_mode(mode: str, meshes: list[tuple[int, int, int]]) -> None:
    """Every mesh against one device."""
    reference = train(mode, None)
    assert reference.losses[1] < reference.losses[0], reference.losses
    assert all(gradient.any() for gradient in reference.gradient.values()), "a gradient of zeros proves nothing"
    for shape in meshes:
        assert_same(train(mode, shape), reference, f"{mode} {shape}")
        print(mode, shape, "ok", flush=True)


def check_wrapped_kernels() -> None:
    """A kernel that works on its own shard, in the place of a GPU's, trains like the reference on the whole."""
    reference = train("gated-lora", None)
    cudnn.range_attention = gpu.range_attention = range_attention.range_attention
    dispatch.device, gpu.refusal = lambda: "gpu 9.0", lambda *_: None
    for shape, attention in (((2, 1, 1), "cudnn"), ((2, 2, 2), "pallas")):
        assert_same(train("gated-lora", shape, attention), reference, f"wrapped {shape}")
        print("wrapped", shape, "ok", flush=True)


# Where XLA's partitioner puts the blocks of rows of a cotangent on a (2, 2, 2) mesh of Auto axes, and leaves them: in
# the order (fsdp, data) instead of (data, fsdp).
MISPLACED = [0, 2, 1, 3]


def misplaced(cotangent: Any) -> Any:
    """A cotangent whose blocks of rows lie where the partitioner's error puts them."""
    return cotangent.reshape(4, -1, *cotangent.shape[1:])[np.array(MISPLACED)].reshape(cotangent.shape)


def check_partitioner() -> None:
    """The error of the partitioner: what it does, that our products are not hit, and that `assert_same` would see it.

    A residual stream plus a product, rows split over data and fsdp and the kernel over fsdp and tp, is the pattern.
    """
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(8, 128)), rng.normal(size=(128, 128)) / 11
    cotangent = np.cos(x + x @ kernel) / x.size
    right, wrong = (cotangent + place(cotangent @ kernel.T) for place in (lambda rows: rows, misplaced))
    assert not close(wrong, right, 0.5)

    def gradient(axes: AxisType, product: Callable[..., Array]) -> Array:
        mesh = jax.make_mesh((2, 2, 2), MESH_AXES, axis_types=(axes,) * 3)
        rows, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((BATCH_AXES, None), ("fsdp", "tp")))
        with jax.set_mesh(mesh):
            given = jax.device_put(x.astype("float32"), rows), jax.device_put(kernel.astype("float32"), split)
            return jax.jit(jax.grad(lambda x, kernel: jnp.sin(x + product(x, kernel)).mean()))(*given)

    def ours(x: Array, kernel: Array) -> Array:
        return jax.reshard(layers.matmul(x, kernel), PartitionSpec(BATCH_AXES, None))

    on_auto = gradient(AxisType.Auto, jnp.matmul)
    assert close(on_auto, wrong) or close(on_auto, right), "another error than the one that is known"
    assert close(gradient(AxisType.Explicit, ours), right)

    reference = train("ar", None)
    with_error = train_with_error()
    np.testing.assert_allclose(with_error.losses[0], reference.losses[0], rtol=2e-6)
    seen = replace(with_error, losses=reference.losses, params=reference.params)
    with pytest.raises(AssertionError, match=r"other gradients of .*self_attn\.q_proj"):
        assert_same(seen, reference, "error in one product")
    print("partitioner ok", flush=True)


def train_with_error() -> Run:
    """Steps on one device in which the error of the partitioner hits one product of each layer, the MLP's last."""
    real = layers.matmul

    @jax.custom_vjp
    def hit(x: Array, kernel: Array) -> Array:
        return real(x, kernel)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        d_x, d_kernel = jax.vjp(real, *saved)[1](cotangent)
        return misplaced(d_x), d_kernel

    hit.defvjp(lambda x, kernel: (real(x, kernel), (x, kernel)), backward)
    down = (MODEL.intermediate_size, MODEL.hidden_size)
    layers.matmul = lambda x, kernel, *dtype: (hit if kernel.shape == down else real)(x, kernel, *dtype)
    try:
        return train("ar", None)
    finally:
        layers.matmul = real


def main() -> None:
    """A check by its name, or a mode and the meshes to compare it on, such as ``full 2,2,2``."""
    what, *meshes = sys.argv[1:]
    checks = {"wrapped": check_wrapped_kernels, "partitioner": check_partitioner}
    if what in checks:
        checks[what]()
    else:
        check_mode(what, [tuple(map(int, mesh.split(","))) for mesh in meshes] or MESHES)


if __name__ == "__main__":
    main()
