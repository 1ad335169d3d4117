"""Logical axes to mesh axes: the one place that says how a weight is laid out over devices (design.md 9)."""

from collections.abc import Callable
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idlm_jax.backbone.weights import Weight


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axis over which each logical axis of a weight is split; None replicates it."""

    vocab: str | None = "tp"
    embed: str | None = "fsdp"
    heads: str | None = "tp"
    kv_heads: str | None = "tp"
    mlp: str | None = "tp"
    head_dim: str | None = None

    def spec(self, weight: Weight, mesh: Mesh) -> PartitionSpec:
        """Partition of one weight; an axis that the mesh lacks, or that does not divide the dimension, replicates."""
        entries: list[str | None] = []
        for axis, size in zip(weight.axes, weight.shape, strict=True):
            mesh_axis: str | None = getattr(self, axis)
            fits = mesh_axis in mesh.shape and size % mesh.shape[mesh_axis] == 0
            entries.append(mesh_axis if fits else None)
        return PartitionSpec(*entries)


def weight_sharding(mesh: Mesh, rules: ShardingRules | None = None) -> Callable[[Weight], NamedSharding]:
    """The sharding of every row of the weight table, in the form that ``load_params`` takes."""
    rules = rules or ShardingRules()
    return lambda weight: NamedSharding(mesh, rules.spec(weight, mesh))
