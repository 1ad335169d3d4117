"""Mask tokens share a row of the table without being looked up: values and gradient are those of a plain lookup."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES
from idlm_jax.backbone.weights import init_params
from tests.decoding.support import tiny_config
from tests.training.support import close

CONFIG = tiny_config(vocab_size=64)
MASK = 63
MESHES = [(1, 1, 1), (1, 1, 8), (8, 1, 1), (2, 2, 2)]
# Tables lie like this on a mesh, and whole where the vocabulary does not divide.
TABLES = [PartitionSpec("tp", "fsdp"), PartitionSpec(None, "fsdp")]

Lookup = Callable[[Array, Array], Array]


def by_model(table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    params = init_params(CONFIG, jax.random.key(0), jnp.dtype(jnp.float32))
    return Qwen3(CONFIG, {**params, "embed_tokens": {"embedding": table}}).embed(tokens, None)


def plain(table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    return jnp.take(table, tokens, axis=0)


def inputs(masks: str) -> tuple[Float[Array, "V D"], Int[Array, "B L"]]:
    """A table, and tokens of which none, most or all are masks; all others come several times too."""
    rng = np.random.default_rng(1)
    share = {"none": 0.0, "most": 0.7, "all": 1.0}[masks]
    tokens = np.where(rng.random((8, 12)) < share, MASK, rng.integers(0, 8, (8, 12)))
    return jnp.asarray(rng.normal(size=(64, 16)), jnp.float32), jnp.asarray(tokens, jnp.int32)


def outcome(lookup: Lookup, table: Float[Array, "V D"], tokens: Int[Array, "B L"]) -> tuple[Array, Array]:
    """Embeddings, and the gradient of a loss in which every one of them has a weight of its own."""

    def loss(table: Array) -> tuple[Array, Array]:
        x = lookup(table, tokens)
        weight = 1 + jnp.arange(12 * 16).reshape(12, 16) / 100
        return jnp.sum(weight * jnp.sin(x)), x

    gradient, x = jax.jit(jax.grad(loss, has_aux=True))(table)
    return x, gradient


def check(ours: tuple[Array, Array], wanted: tuple[Array, Array]) -> None:
    np.testing.assert_array_equal(ours[0], wanted[0])
    assert close(ours[1], wanted[1], 1e-6)


@pytest.mark.parametrize("masks", ["none", "most", "all"])
def test_embeddings_and_the_gradient_of_their_table_are_those_of_a_plain_lookup(masks: str) -> None:
    given = inputs(masks)
    wanted = outcome(plain, *given)
    check(outcome(by_model, *given), wanted)
    assert np.asarray(wanted[1])[MASK].any() == (masks != "none")


def check_meshes() -> None:
    """Needs 8 devices."""
    table, tokens = inputs("most")
    wanted = outcome(plain, table, tokens)
    for shape in MESHES:
        mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh):
            placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(BATCH_AXES, None)))
            for spec in TABLES:
                x, gradient = outcome(by_model, jax.device_put(table, NamedSharding(mesh, spec)), placed)
                check((x, gradient), wanted)
                assert x.sharding.spec == PartitionSpec(BATCH_AXES, None, None), (shape, spec)
                assert gradient.sharding.spec == spec, (shape, spec)


def test_on_a_mesh_they_are_the_same_and_split_like_tokens_and_table() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    code = "from tests.backbone.test_embedding import check_meshes; check_meshes()"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr
