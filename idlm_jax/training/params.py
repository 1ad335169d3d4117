"""The weights of a run as flat dicts from dotted names to arrays: what is trained, what is frozen, and where each lies.

Layers are stacked (design.md 5). Names are those of the weight table without the layer number, and
``adapter.layers.<module>.<projection>.a`` / ``.b`` and ``adapter.mask_embedding``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from idlm_jax.backbone.adapter import Adapter, AdapterConfig, adapter_shapes, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3, Remat
from idlm_jax.backbone.sharding import ShardingRules
from idlm_jax.backbone.weights import Params, build_params, flatten, nest, stack_layers
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError, did_you_mean

Flat = dict[str, Array]
ADAPTER = "adapter"
MASK_EMBEDDING = f"{ADAPTER}.mask_embedding"


@dataclass(frozen=True)
class ModelBuilder:
    """How the weights of a run become a model; static."""

    config: ModelConfig
    adapter: AdapterConfig | None = None
    dtype: str = "bfloat16"
    remat: Remat = Remat.BLOCK

    def build(self, params: Flat) -> Qwen3:
        """The model in the dtype of computation."""
        tree = nest({name: array.astype(self.dtype) for name, array in params.items()})
        adapter = tree.pop(ADAPTER, None)
        loaded = Adapter(self.adapter, adapter) if self.adapter and adapter else None
        return Qwen3(self.config, tree, loaded, self.remat)

    def head(self, params: Flat) -> Float[Array, "V D"]:
        """The output head in the dtype it is kept in."""
        if self.config.tie_word_embeddings:
            return params["embed_tokens.embedding"]
        return params["lm_head.kernel"].T

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of the model and its adapter."""
        table = build_params(self.config, lambda weight: weight.shape)
        layers = {name: (self.config.num_hidden_layers, *shape) for name, shape in flatten(table["layers"][0]).items()}
        shapes = {**flatten({**table, "layers": {}}), **{f"layers.{name}": shape for name, shape in layers.items()}}
        if self.adapter:
            one = flatten(adapter_shapes(self.config, self.adapter)["layers"][0])
            depth = self.config.num_hidden_layers
            shapes |= {f"{ADAPTER}.layers.{name}": (depth, *shape) for name, shape in one.items()}
            shapes[MASK_EMBEDDING] = (self.config.hidden_size,)
        return shapes

    def shardings(self, mesh: Mesh, rules: ShardingRules | None = None) -> dict[str, NamedSharding]:
        """Where every weight of the model and its adapter lies."""
        rules = rules or ShardingRules()
        specs = flatten(_stacked_specs(build_params(self.config, lambda weight: rules.spec(weight, mesh))))
        if self.adapter:
            layers = rules.adapter_specs(self.config, self.adapter, mesh)
            specs |= flatten({ADAPTER: {"layers": layers, "mask_embedding": PartitionSpec(None)}})
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _stacked_specs(specs: Params) -> Params:
    layer = flatten(specs["layers"][0])
    return {**specs, "layers": nest({name: PartitionSpec(None, *spec) for name, spec in layer.items()})}


def flat_base(params: Params) -> Flat:
    """The flat, stacked weights of a loaded (unstacked) model.

    ``params`` is taken apart on the way, so that no more than one weight of all layers is held twice.
    """
    layers = [flatten(layer) for layer in params.pop("layers")]
    stacked = {f"layers.{name}": jnp.stack([layer.pop(name) for layer in layers]) for name in list(layers[0])}
    return {**flatten(params), **stacked}


def fresh_adapter(builder: ModelBuilder, embedding: Float[Array, "V D"], key: Array) -> Flat:
    """A new adapter in float32: A as PEFT draws it, B zero, and as mask embedding the mean of all embeddings."""
    assert builder.adapter is not None
    params = init_adapter(builder.config, builder.adapter, key, jnp.float32).params
    mean = jnp.mean(embedding.astype(jnp.float32), axis=0)
    return flat_adapter({**params, "mask_embedding": mean})


def flat_adapter(params: Params) -> Flat:
    """The flat, stacked float32 weights of an adapter whose layers are a list."""
    stacked = stack_layers({**params, "layers": list(params["layers"])})
    return {name: jnp.asarray(array, jnp.float32) for name, array in flatten({ADAPTER: stacked}).items()}


def split_trained(params: Flat, mode: str, freeze: Sequence[str], dtype: str) -> tuple[Flat, Flat]:
    """(trained in float32, frozen in ``dtype``); see ``trained_names``."""
    trained = trained_names(params, mode, freeze)
    return (
        {name: params[name].astype(jnp.float32) for name in trained},
        {name: array.astype(dtype) for name, array in sorted(params.items()) if name not in trained},
    )


def trained_names(names: Iterable[str], mode: str, freeze: Sequence[str]) -> list[str]:
    """What a run trains: in LoRA modes the adapter, else the model, but for what matches a pattern of ``freeze``.

    Raises UserError for a pattern (``layers.mlp.*``) that matches nothing, and when nothing is left to train.
    """
    candidates = sorted(name for name in names if name.startswith(f"{ADAPTER}.") == mode.endswith("lora"))
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise UserError(f"freeze: '{pattern}' matches no trained weight{did_you_mean(pattern, candidates)}")
    trained = [name for name in candidates if not any(fnmatchcase(name, pattern) for pattern in freeze)]
    if not trained:
        raise UserError("freeze: nothing is left to train")
    return trained
