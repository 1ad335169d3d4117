"""Logical axes to mesh axes: the one place that says how a weight is laid out over devices (design.md 9)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from idlm_jax.backbone.adapter import Adapter, AdapterConfig, adapted_weights
from idlm_jax.backbone.weights import Weight
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError

# The mesh of training: copies of the model, shards of weights and batch, and shards of heads, MLP and vocabulary.
MESH_AXES = ("data", "fsdp", "tp")
# Every batch axis is split over both.
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axis over which each logical axis of a weight is split; None replicates it."""

    vocab: str | None = "tp"
    embed: str | None = "fsdp"
    heads: str | None = "tp"
    kv_heads: str | None = "tp"
    mlp: str | None = "tp"
    head_dim: str | None = None
    # Of an adapter, over which its matrices are split as well, where the weights they stand beside are not.
    adapter: str | None = "fsdp"

    def spec(self, weight: Weight, mesh: Mesh) -> PartitionSpec:
        """Partition of one weight; an axis that the mesh lacks, or that does not divide the dimension, replicates.

        A vector over the residual stream (norms, the bias of o) is always replicated: it is small, and it meets
        activations whose batch is split over the same mesh axis.
        """
        if weight.axes == ("embed",):
            return PartitionSpec(None)
        return PartitionSpec(*map(partial(self._mesh_axis, mesh), weight.axes, weight.shape))

    def _mesh_axis(self, mesh: Mesh, axis: str, size: int) -> str | None:
        mesh_axis: str | None = getattr(self, axis)
        return mesh_axis if mesh_axis in mesh.shape and size % mesh.shape[mesh_axis] == 0 else None

    def adapter_specs(self, config: ModelConfig, adapter: AdapterConfig, mesh: Mesh) -> dict[str, dict]:
        """Partition of the stacked matrices of an adapter: each like the side of the weight it stands beside, or finer.

        The rank is left whole: products over a split rank would add up outputs as wide as the weight's.
        """
        specs: dict[str, dict] = {}
        for module, name, weight in adapted_weights(config, adapter, 0):
            inputs, outputs = map(partial(self._adapter_axes, mesh), weight.axes, weight.shape)
            specs.setdefault(module, {})[name] = {
                "a": PartitionSpec(None, inputs, None),
                "b": PartitionSpec(None, None, outputs),
            }
        return specs

    def _adapter_axes(self, mesh: Mesh, axis: str, size: int) -> str | tuple[str, ...] | None:
        own = self._mesh_axis(mesh, axis, size)
        if self.adapter not in mesh.shape or own == self.adapter:
            return own
        axes = (self.adapter,) if own is None else (own, self.adapter)
        return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else own


def device_mesh(sizes: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of training over all devices, or those given."""
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, devices=devices)
    except NotImplementedError:  # an axis that is part of a side of the torus, such as tp = 2 of 4 × 4 × 4 chips
        placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def weight_sharding(mesh: Mesh, rules: ShardingRules | None = None) -> Callable[[Weight], NamedSharding]:
    """The sharding of every row of the weight table, in the form that ``load_params`` takes."""
    rules = rules or ShardingRules()
    return lambda weight: NamedSharding(mesh, rules.spec(weight, mesh))


def adapter_sharding(config: ModelConfig, adapter: Adapter, mesh: Mesh) -> dict[str, Any]:
    """The sharding of every array of an adapter with unstacked layers, as a tree like its own."""
    specs = ShardingRules().adapter_specs(config, adapter.config, mesh)
    layer = jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec(*spec[1:])), specs)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return {**dict.fromkeys(adapter.params, everywhere), "layers": [layer] * config.num_hidden_layers}


def decoding_mesh(config: ModelConfig, tp: int, data_parallel: int) -> Mesh | None:
    """``data_parallel`` copies of a model, each on ``tp`` devices; None where that is one device, which needs no mesh.

    Raises UserError for what the key heads or the devices do not allow. Batches are powers of two, so only such a
    number of copies can split them.
    """
    heads, devices = config.num_key_value_heads, jax.device_count()
    parts = [count for count in range(1, devices + 1) if heads % count == 0]
    if tp not in parts:
        raise UserError(f"tp must be {_listed(parts)}, not {tp} (key heads: {heads}, devices: {devices})")
    copies = [1 << power for power in range((devices // tp).bit_length())]
    if data_parallel not in copies:
        raise UserError(f"data_parallel must be {_listed(copies)}, not {data_parallel} (devices: {devices}, tp: {tp})")
    if tp * data_parallel == 1:
        return None
    return device_mesh((data_parallel, 1, tp), jax.devices()[: tp * data_parallel])


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def cache_spec(mesh: Mesh | AbstractMesh, requests: int, kv_heads: int) -> PartitionSpec:
    """Partition of a key/value cache [requests, key heads, slots, head_dim].

    Requests that the mesh cannot split are on every device; key heads that it cannot split are refused.
    """
    sizes = [mesh.shape.get(axis, 1) for axis in (*BATCH_AXES, "tp")]
    if kv_heads % sizes[-1]:
        raise UserError(f"mesh: tp {sizes[-1]} does not divide the model's {kv_heads} key heads")
    split = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    by_request = split if split and requests % math.prod(sizes[:-1]) == 0 else None
    return PartitionSpec(by_request, "tp" if "tp" in mesh.shape else None, None, None)
