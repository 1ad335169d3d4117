"""A LoRA adapter: which projections it touches, its matrices, and an optional trained mask embedding (method.md 4).

Whether an adapter is *gated* (mask rows only, lossless) or not is the choice of whoever runs the model; the adapter
itself is the same.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from idlm_jax.backbone.weights import FUSED_PROJECTIONS, Params, Weight, layer_weights, side_by_side
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError, did_you_mean

# Module of a decoder layer that holds each projection an adapter may touch.
TARGET_MODULES = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of a LoRA adapter; names follow PEFT where PEFT has them."""

    rank: int
    alpha: float
    # Projections the adapter touches, in every layer; keys of TARGET_MODULES.
    target_modules: tuple[str, ...] = tuple(TARGET_MODULES)
    # Rank-stabilised scaling: alpha / sqrt(rank) instead of alpha / rank.
    use_rslora: bool = False
    # The token whose rows draft, when the adapter rather than the base model names it.
    mask_token_id: int | None = None
    # Hugging Face id or path of the model it was trained on.
    base_model: str | None = None

    @property
    def scale(self) -> float:
        """Factor on the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def validate(self, where: str) -> None:
        """Raise UserError for a rank below one or a projection that does not exist."""
        if self.rank < 1:
            raise UserError(f"{where}: LoRA rank must be at least 1, not {self.rank}")
        for target in self.target_modules:
            if target not in TARGET_MODULES:
                raise UserError(f"{where}: unknown target module '{target}'{did_you_mean(target, TARGET_MODULES)}")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and its matrices."""

    config: AdapterConfig
    # {"layers": [{"self_attn": {"q_proj": {"a": [in, R], "b": [R, out]}, …}, "mlp": …}, …]}, one entry a layer, and
    # optionally {"mask_embedding": [D]}: the embedding of the mask token on adapted rows.
    params: dict[str, Any]

    def check_fits(self, config: ModelConfig, where: str) -> None:
        """Raise UserError when the adapter was made for a model of another shape."""
        expected = adapter_shapes(config, self.config)
        layers = self.params["layers"]
        if len(layers) != len(expected["layers"]):
            raise UserError(
                f"{where}: adapter for another model: {len(layers)} layers, the model has {len(expected['layers'])}"
            )
        mask_embedding = self.params.get("mask_embedding")
        if mask_embedding is not None and mask_embedding.shape != (config.hidden_size,):
            raise UserError(
                f"{where}: adapter for another model: mask embedding of shape {tuple(mask_embedding.shape)}, "
                f"hidden_size is {config.hidden_size}"
            )
        given, _ = jax.tree.flatten_with_path({"layers": layers})
        wanted, _ = jax.tree.flatten_with_path(expected, is_leaf=lambda leaf: isinstance(leaf, tuple))
        for (path, array), (wanted_path, shape) in zip(given, wanted, strict=True):
            if path != wanted_path or tuple(array.shape) != shape:
                raise UserError(
                    f"{where}: adapter for another model: {jax.tree_util.keystr(path, simple=True, separator='.')} has "
                    f"shape {tuple(array.shape)}, the model needs {shape}"
                )

    def astype(self, dtype: jnp.dtype) -> "Adapter":
        """The adapter with its matrices as JAX arrays of ``dtype``."""
        return Adapter(self.config, jax.tree.map(lambda array: jnp.asarray(array, dtype), self.params))


def adapted_weights(config: ModelConfig, adapter: AdapterConfig, layer: int) -> list[tuple[str, str, Weight]]:
    """(module, projection, row of the weight table) of everything the adapter touches in one layer."""
    kernels = {
        weight.path.split(".")[-2]: weight for weight in layer_weights(config, layer) if weight.path.endswith("kernel")
    }
    return [(TARGET_MODULES[name], name, kernels[name]) for name in TARGET_MODULES if name in adapter.target_modules]


def adapter_shapes(config: ModelConfig, adapter: AdapterConfig) -> dict[str, Any]:
    """The tree of an adapter's matrices with a shape tuple for each leaf."""
    layers = []
    for layer in range(config.num_hidden_layers):
        tree: dict[str, dict] = {}
        for module, name, weight in adapted_weights(config, adapter, layer):
            inputs, outputs = weight.shape
            tree.setdefault(module, {})[name] = {"a": (inputs, adapter.rank), "b": (adapter.rank, outputs)}
        layers.append(tree)
    return {"layers": layers}


def init_adapter(
    config: ModelConfig, adapter: AdapterConfig, key: jax.Array, dtype: jnp.dtype, b_scale: float = 0.0
) -> Adapter:
    """A fresh adapter: A uniform as PEFT draws it (Kaiming, a = sqrt(5)), B zero or normal(0, b_scale)."""
    leaves, tree = jax.tree.flatten(adapter_shapes(config, adapter), is_leaf=lambda leaf: isinstance(leaf, tuple))
    arrays = []
    for i, (rows, columns) in enumerate(leaves):
        leaf_key = jax.random.fold_in(key, i)
        if columns == adapter.rank and i % 2 == 0:  # leaves alternate: a, b, a, b, …
            bound = 1.0 / math.sqrt(rows)
            arrays.append(jax.random.uniform(leaf_key, (rows, columns), dtype, -bound, bound))
        else:
            arrays.append(b_scale * jax.random.normal(leaf_key, (rows, columns), dtype))
    return Adapter(adapter, jax.tree.unflatten(tree, arrays))


# An absorbed rank is filled up with zeros to a multiple of this: rows of a product stay aligned, tensor cores full.
_RANK_STEP = 16


def absorb(config: ModelConfig, params: Params, adapter: Adapter) -> Adapter:
    """Put the first matrices of an adapter beside the (fused, unstacked) kernels of the same input.

    The products of a decode step then begin the adapter as well, which costs the bytes of those matrices and no launch.
    The kernels in ``params`` are replaced, one layer after the other; the adapter that is returned goes with them and
    holds the second matrices alone, side by side as the columns of the kernels, zero for projections without adapter.
    On a mesh each device with columns of a kernel has all of the first matrices beside them.
    """
    groups = [*FUSED_PROJECTIONS, ("self_attn", "o_proj", ("o_proj",)), ("mlp", "down_proj", ("down_proj",))]
    columns = {weight.path.split(".")[-2]: weight.shape[-1] for weight in layer_weights(config, 0)}
    padding = -adapter.config.rank % _RANK_STEP
    layers = []
    for layer, lora in zip(params["layers"], adapter.params["layers"], strict=True):
        second: dict[str, dict] = {}
        for module, name, parts in groups:
            given = [lora.get(module, {}).get(part) for part in parts]
            if not any(given):
                continue
            some = next(filter(None, given))
            sharding = jax.typeof(some["b"]).sharding
            spec = None if sharding.mesh.empty else sharding.spec
            zero = [jnp.zeros((len(some["b"]), columns[part]), some["b"].dtype, out_sharding=spec) for part in parts]
            a = [jnp.zeros_like(some["a"]) if one is None else one["a"] for one in given]
            b = [zero[i] if one is None else one["b"] for i, one in enumerate(given)]
            a = [jnp.pad(matrix, ((0, 0), (0, padding))) for matrix in a]
            weights = layer[module][name]
            layer[module][name] = {**weights, "kernel": side_by_side(weights["kernel"], *a)}
            second.setdefault(module, {})[name] = {"b": jnp.pad(side_by_side(*b), ((0, padding), (0, 0)))}
        layers.append(second)
    return Adapter(adapter.config, {**adapter.params, "layers": layers})
