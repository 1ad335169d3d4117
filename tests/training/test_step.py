"""One optimizer step: parts are averaged, and what is not a number changes nothing."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES
from idlm_jax.backbone.weights import init_params
from idlm_jax.training.groups import GroupPolicy
from idlm_jax.training.objective import Objective
from idlm_jax.training.params import Flat, ModelBuilder, flat_base, split_trained
from idlm_jax.training.step import TrainState, init_state, make_train_step
from tests.decoding.support import tiny_config
from tests.training.runs import shared_compilations
from tests.training.support import random_batch

VOCAB = 32
CONFIG = tiny_config(vocab_size=VOCAB)
# A step of plain gradient descent at rate 1 shows the gradient itself.
OPTIMIZER = optax.sgd(1.0)
# Without mask groups nothing is random, so a part gives the same whatever its number.
STEP = make_train_step(
    ModelBuilder(CONFIG, None, "float32"),
    Objective("ar", GroupPolicy(1)),
    OPTIMIZER,
    seed=0,
)


@pytest.fixture(autouse=True, scope="module")
def compiled_fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_compilations(tmp_path_factory):
        yield


def weights() -> tuple[Flat, Flat]:
    """(trained, frozen)"""
    params = flat_base(init_params(CONFIG, jax.random.key(0), jnp.dtype(jnp.float32)))
    return split_trained(params, "ar", ["norm.*"], "float32")


def state_of(params: Flat) -> TrainState:
    return init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)


def as_parts(batch: Any, parts: int) -> Any:
    return jax.tree.map(lambda array: array.reshape(parts, -1, array.shape[-1]), batch)


def test_parts_weigh_the_same_however_many_of_their_rows_carry_loss() -> None:
    trained, frozen = weights()
    batch = random_batch(4, 24, VOCAB - 1)
    # The second part has hardly any.
    few = batch.loss_mask.at[2:].set(batch.loss_mask[2:] & (batch.positions[2:] < 6))
    parts = as_parts(batch.__class__(batch.tokens, batch.segment_ids, batch.positions, few), 2)
    together, result = STEP(state_of(trained), frozen, parts)
    alone = [STEP(state_of(trained), frozen, jax.tree.map(lambda a, i=i: a[i : i + 1], parts)) for i in range(2)]
    losses, counts = zip(*((one.losses.total, one.losses.clean_rows) for _, one in alone), strict=True)
    np.testing.assert_allclose(result.losses.total, np.mean(losses), rtol=1e-6)
    assert abs(result.losses.total - np.average(losses, weights=counts)) > 1e-3
    assert int(result.losses.clean_rows) == sum(map(int, counts)) and counts[0] >= 2 * counts[1]
    for name, after in together.params.items():
        mean = sum(state.params[name] for state, _ in alone) / 2
        np.testing.assert_allclose(after, mean, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_step_that_is_no_number_changes_nothing() -> None:
    trained, frozen = weights()
    parts = as_parts(random_batch(2, 24, VOCAB - 1), 1)
    good, result = STEP(state_of(trained), frozen, parts)
    assert bool(result.finite) and int(good.step) == 1
    frozen = {name: array.at[0].set(jnp.nan) for name, array in frozen.items()}
    kept, result = STEP(state_of(trained), frozen, parts)
    assert not bool(result.finite) and not np.isfinite(float(result.losses.total))
    assert int(kept.step) == 0
    assert all(np.array_equal(kept.params[name], trained[name]) for name in trained)


@pytest.mark.parametrize("block_size", [1, 8])
def test_parts_of_one_row_on_a_mesh_of_one_device_add_up(block_size: int) -> None:
    """Traced alone: reshapes of one row, or of groups of one, must not change how sums over parts are split."""
    builder = ModelBuilder(CONFIG, None, "float32")
    objective = Objective("full", GroupPolicy(block_size, density=0.1))
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        placement = builder.shardings(mesh)
        trained, frozen = (
            {name: jax.device_put(array, placement[name]) for name, array in params.items()} for params in weights()
        )
        split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))
        parts = jax.device_put(as_parts(random_batch(3, 24, VOCAB - 1), 3), split)
        step = make_train_step(builder, objective, OPTIMIZER, seed=0)
        _, result = jax.eval_shape(step, state_of(trained), frozen, parts)
    assert result.losses.noisy_by_depth.shape == (block_size,)
