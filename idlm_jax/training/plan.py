"""What a run would take, found out by compiling its step without loading a weight: ``idlm train --dry-run``."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from idlm_jax.backbone.sharding import BATCH_AXES
from idlm_jax.training.config import TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.objective import Objective
from idlm_jax.training.params import trained_names
from idlm_jax.training.setup import Setup
from idlm_jax.training.step import TrainState, init_state, make_train_step, objective_of


@dataclass(frozen=True)
class Plan:
    """A run at a glance; bytes are those of one device."""

    mesh: str
    devices: str
    rows: int
    # Tokens of a step, and the most noisy rows of it in any stage.
    tokens: int
    noisy_rows: int
    # (name, shape, dtype, bytes, trained)
    weights: list[tuple[str, tuple[int, ...], str, int, bool]]
    memory: dict[str, int]


def plan(config: TrainConfig) -> Plan:
    """Compile the stage with the most noisy rows and read off its memory; raises UserError as a run would."""
    setup = Setup.from_config(config)
    with jax.set_mesh(setup.mesh):
        return _plan(setup)


@dataclass(frozen=True)
class AbstractStep:
    """The step of the stage with the most noisy rows, and the shapes that it takes."""

    step: jax.stages.Wrapped
    objective: Objective
    # Noisy rows of a row of tokens.
    noisy_rows: int
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: Batch

    def lower(self) -> jax.stages.Lowered:
        """For the devices of the mesh that it was made for."""
        return self.step.lower(self.state, self.frozen, self.batch)


def abstract_step(setup: Setup) -> AbstractStep:
    """What a run would compile; to be called with its mesh set."""
    config, builder = setup.config, setup.builder
    shapes, shardings = builder.shapes(), builder.shardings(setup.mesh)
    trained = trained_names(shapes, config.mode, config.freeze)

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if name in trained else jnp.dtype(config.dtype)
        return jax.ShapeDtypeStruct(shapes[name], dtype, sharding=shardings[name])

    params = {name: abstract(name) for name in trained}
    frozen = {name: abstract(name) for name in sorted(set(shapes) - set(trained))}
    state = jax.eval_shape(lambda params: init_state(params, setup.optimizer), params)
    parts, rows = config.accumulation, config.batch_size // config.accumulation

    def field(dtype: Any) -> Any:
        sharding = NamedSharding(setup.mesh, PartitionSpec(None, BATCH_AXES, None))
        return jax.ShapeDtypeStruct((parts, rows, config.length), dtype, sharding=sharding)

    batch = Batch(field(jnp.int32), field(jnp.int32), field(jnp.int32), field(jnp.bool_))
    objectives = [objective_of(config, stage) for stage in config.stages]
    rows_of = [objective.groups.groups(config.length) * objective.groups.block_size for objective in objectives]
    widest = max(range(len(objectives)), key=rows_of.__getitem__)
    step = make_train_step(builder, objectives[widest], setup.optimizer, config.seed)
    noisy_rows = 0 if config.mode == "ar" else rows_of[widest]
    return AbstractStep(step, objectives[widest], noisy_rows, state, frozen, batch)


def _plan(setup: Setup) -> Plan:
    config, abstract = setup.config, abstract_step(setup)
    params, frozen = abstract.state.params, abstract.frozen
    analysis = abstract.lower().compile().memory_analysis()
    assert analysis is not None, "every backend of ours tells the memory of a program"
    weights = [
        (name, array.shape, str(array.dtype), device_bytes(array), name in params)
        for name, array in (params | frozen).items()
    ]
    return Plan(
        mesh=" × ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
        + (f", {config.accumulation} parts a step" if config.accumulation > 1 else ""),
        devices=f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        rows=config.batch_size,
        tokens=config.batch_size * config.length,
        noisy_rows=config.batch_size * abstract.noisy_rows,
        weights=weights,
        memory={
            "trained weights": device_bytes(params),
            "optimizer": device_bytes(abstract.state.optimizer),
            "frozen weights": device_bytes(frozen),
            "gradients and activations": analysis.temp_size_in_bytes,
            "total": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes,
        },
    )


def device_bytes(tree: Any) -> int:
    """Bytes that one device has of arrays, or of shapes that say where they lie."""

    def size(array: Any) -> int:
        shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
