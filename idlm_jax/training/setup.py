"""From a TrainConfig to what a run needs: mesh, weights, optimizer, data; checked before anything is spent."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idlm_jax.backbone.adapter import Adapter, AdapterConfig
from idlm_jax.backbone.qwen3 import Remat
from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES, device_mesh, weight_sharding
from idlm_jax.backbone.weights import nest
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.checkpoint.source import WeightSource, find_mask_token
from idlm_jax.config import ModelConfig
from idlm_jax.data.pipeline import Documents, JoinedDocuments, held_out_split, make_dataset
from idlm_jax.data.tokens import TokenStore, check_tokenizer
from idlm_jax.errors import UserError
from idlm_jax.training.config import AdapterSettings, MeshSettings, TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.params import (
    ADAPTER,
    Flat,
    ModelBuilder,
    flat_adapter,
    flat_base,
    fresh_adapter,
    split_trained,
    trained_names,
)
from idlm_jax.training.step import TrainState, init_state, make_optimizer


def make_mesh(settings: MeshSettings, config: ModelConfig, over: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over all devices (``over``: those); raises UserError when they or the heads cannot be split."""
    sizes = {axis: getattr(settings, axis) for axis in MESH_AXES}
    devices = jax.device_count() if over is None else len(over)
    given = int(np.prod([size for size in sizes.values() if size != -1]))
    sizes = {axis: max(1, devices // given) if size == -1 else size for axis, size in sizes.items()}
    shape = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    if int(np.prod(list(sizes.values()))) != devices:
        raise UserError(f"mesh: {shape} is not {devices}, the number of devices; change 'mesh' (-1 takes what is left)")
    if config.num_key_value_heads % sizes["tp"]:
        raise UserError(f"mesh.tp: {sizes['tp']} does not divide the model's {config.num_key_value_heads} key heads")
    return device_mesh(list(sizes.values()), over)


def fitting_parts(config: TrainConfig, shards: int) -> int | None:
    """The parts that a step is computed in: those of the file, or as many as leave a row of each to every shard.

    None where the rows of a step cannot be split over the shards at all.
    """
    parts = range(config.accumulation, 0, -1)
    return next((count for count in parts if config.batch_size % (count * shards) == 0), None)


@dataclass(frozen=True)
class Setup:
    """Everything a run needs besides the data; weights are loaded when they are first asked for."""

    config: TrainConfig
    source: WeightSource
    mesh: Mesh
    builder: ModelBuilder
    optimizer: optax.GradientTransformation

    @classmethod
    def from_config(cls, config: TrainConfig) -> "Setup":
        """Open the model and check that everything fits together; raises UserError."""
        return cls.of(config, open_source(config.model))

    @classmethod
    def of(cls, config: TrainConfig, source: WeightSource, devices: Sequence[jax.Device] | None = None) -> "Setup":
        """As ``from_config``, of a model that is open, over the devices given instead of all there are."""
        adapter = _adapter_config(config, source.config) if config.mode.endswith("lora") else None
        model_config = _with_mask_token(config, source, adapter)
        if config.length > model_config.max_position_embeddings:
            raise UserError(
                f"length {config.length} exceeds the model's context of {model_config.max_position_embeddings}"
            )
        mesh = make_mesh(config.mesh, model_config, devices)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        parts = fitting_parts(config, shards)
        if parts is None:
            raise UserError(
                f"batch_size: {config.batch_size} rows cannot be split over {shards} devices (mesh data × fsdp)"
            )
        config = replace(config, accumulation=parts)
        builder = ModelBuilder(model_config, adapter, config.dtype, Remat(config.remat))
        trained_names(builder.shapes(), config.mode, config.freeze)
        return cls(config, source, mesh, builder, make_optimizer(config))

    def load(self) -> tuple[Flat, Flat]:
        """The weights at the start of the run: (trained, frozen)."""
        config = self.config
        mixed = "lora" in config.mode
        dtype = jnp.dtype(config.dtype if mixed else "float32")
        params = flat_base(load_params(self.source, dtype, weight_sharding(self.mesh)))
        if self.builder.adapter:
            params |= self._adapter(params["embed_tokens.embedding"])
        placement = self.builder.shardings(self.mesh)
        params = {name: jax.device_put(array, placement[name]) for name, array in params.items()}
        return split_trained(params, config.mode, config.freeze, config.dtype)

    def _adapter(self, embedding: jax.Array) -> Flat:
        start_from = self.config.adapter.start_from
        if start_from is None:
            key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
            return fresh_adapter(self.builder, embedding, key)
        params = load_adapter(start_from, self.builder.config).params
        if "mask_embedding" not in params:
            params = {**params, "mask_embedding": jnp.mean(embedding.astype(jnp.float32), axis=0)}
        return flat_adapter(params)

    def start(self) -> tuple[TrainState, Flat]:
        """The state before the first step, and the frozen weights."""
        trained, frozen = self.load()
        return init_state(trained, self.optimizer), frozen

    def place(self, arrays: dict[str, np.ndarray], parts: int | None = None) -> Batch:
        """Rows as a Batch spread over the mesh, with a leading axis of parts (default: none).

        Every process gives all rows; those that lie on devices of others may hold anything.
        """

        def put(array: np.ndarray) -> jax.Array:
            whole = array if parts is None else array.reshape(parts, -1, *array.shape[1:])
            return jax.make_array_from_callback(whole.shape, self._rows(parts), lambda index: whole[index])

        return Batch.from_dict({name: put(array) for name, array in arrays.items()})

    def rows_here(self, count: int, parts: int | None = None) -> list[int]:
        """Which of so many rows ``place`` puts on devices of this process."""
        rows = np.arange(count) if parts is None else np.arange(count).reshape(parts, -1)
        places = self._rows(parts).addressable_devices_indices_map((*rows.shape, 1)).values()
        return sorted({int(row) for index in places if index is not None for row in rows[index[:-1]].ravel()})

    def _rows(self, parts: int | None) -> NamedSharding:
        leading = () if parts is None else (None,)
        return NamedSharding(self.mesh, PartitionSpec(*leading, BATCH_AXES, None))


@dataclass(frozen=True)
class Data:
    """The documents of a run, split into those to train on and those to measure on."""

    setup: Setup
    documents: Documents

    @classmethod
    def open(cls, setup: Setup) -> "Data":
        """Open the stores of the run; raises UserError when one was made with another tokenizer."""
        if not setup.config.data:
            raise UserError("data: name at least one token store made by `idlm data`")
        tokenizer, stores = setup.source.tokenizer(), []
        for path in setup.config.data:
            stores.append(TokenStore.open(path))
            check_tokenizer(stores[-1].metadata, tokenizer, path)
        return cls(setup, stores[0] if len(stores) == 1 else JoinedDocuments(stores))

    @cached_property
    def _split(self) -> tuple[Documents, Documents | None]:
        config = self.setup.config
        if not config.evaluation.documents:
            return self.documents, None
        return held_out_split(self.documents, config.evaluation.documents, config.seed)

    def training(self) -> Any:
        """The Grain iterator of training rows; its position can be saved."""
        config = self.setup.config
        return iter(
            make_dataset(
                self._split[0],
                length=config.length,
                batch_size=config.batch_size,
                seed=config.seed,
                rows=self.setup.rows_here(config.batch_size, config.accumulation),
            )
        )

    def held_out(self) -> Iterator[Batch]:
        """All held-out documents once, in rows as many as a part of a training step has."""
        config, documents = self.setup.config, self._split[1]
        if documents is None:
            return
        rows = config.batch_size // config.accumulation
        dataset = make_dataset(
            documents,
            length=config.length,
            batch_size=rows,
            seed=config.seed,
            shuffle=False,
            epochs=1,
            rows=self.setup.rows_here(rows),
        )
        with closing(iter(dataset)) as batches:
            yield from map(self.setup.place, batches)


def _adapter_config(config: TrainConfig, model: ModelConfig) -> AdapterConfig:
    settings: AdapterSettings = config.adapter
    if settings.start_from is not None:
        return load_adapter(settings.start_from, model).config
    adapter = AdapterConfig(
        rank=settings.rank,
        alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        base_model=config.model,
    )
    adapter.validate("adapter")
    return adapter


def _with_mask_token(config: TrainConfig, source: WeightSource, adapter: AdapterConfig | None) -> ModelConfig:
    if config.mode == "ar":
        return source.config
    if config.mask_token is not None:
        return source.config.replace(mask_token_id=find_mask_token(source, config.mask_token))
    if adapter and adapter.mask_token_id is not None:
        return source.config.replace(mask_token_id=adapter.mask_token_id)
    if source.config.mask_token_id is None:
        raise UserError(f"{config.model} names no mask token: set 'mask_token' to one that text never contains")
    return source.config


def trained_adapter(setup: Setup, params: Flat) -> Adapter:
    """The adapter that a run has trained, ready for ``checkpoint.peft.save_adapter``; gathers it on every process."""
    assert setup.builder.adapter is not None
    gathered = multihost_utils.process_allgather(params, tiled=True) if jax.process_count() > 1 else params
    # In the dtype it was computed in: what decoding loads is then bit for bit what was trained.
    tree = nest({name: np.asarray(array.astype(setup.config.dtype)) for name, array in gathered.items()})[ADAPTER]
    config = replace(setup.builder.adapter, mask_token_id=setup.builder.config.mask_token_id)
    return Adapter(config, tree)


def output_directory(config: TrainConfig) -> Path:
    """Where the run writes."""
    return Path(config.output).expanduser()
