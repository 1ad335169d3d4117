"""The one table of weights: every tensor of a model declared once, everything else derived from it.

A row names the tensor in our tree and in a Hugging Face file, its shape, its logical axes, whether the two layouts are
transposes of each other, and how it is initialised. Initialisation, sharding, import, export and the table that
``idlm info`` prints all read these rows (design.md 5).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from idlm_jax.config import ModelConfig
from pallas_kernels.dispatch import on_each_device

# A nested dict of arrays; ``layers`` is a list of dicts (unstacked) or one dict with a leading layer axis (stacked).
Params = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """One tensor of the model."""

    # Dotted path in our tree; a layer's tensors start with "layers.<i>.".
    path: str
    # Shape in our layout.
    shape: tuple[int, ...]
    # Logical axis of each dimension, resolved to mesh axes by ``sharding.ShardingRules``.
    axes: tuple[str, ...]
    # Name in a Hugging Face safetensors file.
    hf_name: str
    # True when Hugging Face stores the transpose of our layout (its Linear weights are [out, in], ours [in, out]).
    transpose: bool
    # "normal" (initializer_range), "ones" or "zeros".
    init: str

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape in a Hugging Face file."""
        return self.shape[::-1] if self.transpose else self.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _linear(path: str, hf: str, inputs: tuple[int, str], outputs: tuple[int, str], bias: bool) -> list[Weight]:
    rows = [Weight(f"{path}.kernel", (inputs[0], outputs[0]), (inputs[1], outputs[1]), f"{hf}.weight", True, "normal")]
    if bias:
        rows.append(Weight(f"{path}.bias", (outputs[0],), (outputs[1],), f"{hf}.bias", False, "zeros"))
    return rows


def _norm(path: str, hf: str, size: int, axis: str) -> Weight:
    return Weight(f"{path}.scale", (size,), (axis,), f"{hf}.weight", False, "ones")


def layer_weights(config: ModelConfig, layer: int) -> list[Weight]:
    """The tensors of one decoder layer, in the order in which they are used."""
    ours, hf = f"layers.{layer}", f"model.layers.{layer}"
    embed = (config.hidden_size, "embed")
    heads = (config.num_attention_heads * config.head_dim, "heads")
    kv_heads = (config.num_key_value_heads * config.head_dim, "kv_heads")
    mlp = (config.intermediate_size, "mlp")
    attention = [
        ("q_proj", embed, heads, config.attention_bias),
        ("k_proj", embed, kv_heads, config.attention_bias),
        ("v_proj", embed, kv_heads, config.attention_bias),
        ("o_proj", heads, embed, config.attention_output_bias),
    ]
    rows = [_norm(f"{ours}.input_layernorm", f"{hf}.input_layernorm", *embed)]
    for name, inputs, outputs, bias in attention:
        rows += _linear(f"{ours}.self_attn.{name}", f"{hf}.self_attn.{name}", inputs, outputs, bias)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            rows.append(_norm(f"{ours}.self_attn.{name}", f"{hf}.self_attn.{name}", config.head_dim, "head_dim"))
    rows.append(_norm(f"{ours}.post_attention_layernorm", f"{hf}.post_attention_layernorm", *embed))
    for name, inputs, outputs in (("gate_proj", embed, mlp), ("up_proj", embed, mlp), ("down_proj", mlp, embed)):
        rows += _linear(f"{ours}.mlp.{name}", f"{hf}.mlp.{name}", inputs, outputs, bias=False)
    return rows


def weight_table(config: ModelConfig) -> list[Weight]:
    """All tensors of a model, in the order in which they are used. A tied head has no row of its own."""
    shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
    rows = [Weight("embed_tokens.embedding", shape, axes, "model.embed_tokens.weight", False, "normal")]
    for layer in range(config.num_hidden_layers):
        rows += layer_weights(config, layer)
    rows.append(_norm("norm", "model.norm", config.hidden_size, "embed"))
    if not config.tie_word_embeddings:
        rows.append(Weight("lm_head.kernel", shape[::-1], axes[::-1], "lm_head.weight", True, "normal"))
    return rows


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; a tied head is counted once."""
    return sum(weight.size for weight in weight_table(config))


def build_params(config: ModelConfig, make: Callable[[Weight], Any]) -> Params:
    """The (unstacked) parameter tree whose leaf for each row of the table is ``make(row)``."""
    params: Params = {"layers": [{} for _ in range(config.num_hidden_layers)]}
    for weight in weight_table(config):
        *parents, leaf = weight.path.split(".")
        node: Any = params
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[leaf] = make(weight)
    return params


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Shapes and dtypes of the parameters, without memory behind them."""
    return build_params(config, lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype))


def init_params(
    config: ModelConfig, key: jax.Array, dtype: jnp.dtype, sharding: Callable[[Weight], Sharding] | None = None
) -> Params:
    """Freshly initialised parameters: normal(0, initializer_range), norms one, biases zero (method.md 1.1).

    With ``sharding`` each is made where it lies, the same numbers as on one device up to rounding.
    """
    index = {weight.path: i for i, weight in enumerate(weight_table(config))}

    def fill(number: int | jax.Array, shape: tuple[int, ...], init: str) -> jax.Array:
        if init == "normal":
            noise = jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
            return (config.initializer_range * noise).astype(dtype)
        return jnp.full(shape, 1.0 if init == "ones" else 0.0, dtype)

    if sharding is None:
        return build_params(config, lambda weight: fill(index[weight.path], weight.shape, weight.init))

    @cache
    def compiled(shape: tuple[int, ...], init: str, where: Sharding) -> Callable[[int], jax.Array]:
        # One program for all weights that are alike: those of a model are hundreds.
        return jax.jit(partial(fill, shape=shape, init=init), out_shardings=where)

    return build_params(
        config, lambda weight: compiled(weight.shape, weight.init, sharding(weight))(index[weight.path])
    )


# Orbax has types of its own for trees, so these two say Any.
def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict with dotted names."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        flat |= flatten(node, f"{prefix}{name}.") if isinstance(node, Mapping) else {prefix + name: node}
    return flat


def nest(flat: Mapping[str, Any]) -> Any:
    """The inverse of ``flatten``."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def stack_layers(params: Params) -> Params:
    """Unstacked to stacked: one tree with a leading layer axis, what training scans over (design.md 5)."""
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def unstack_layers(params: Params) -> Params:
    """Stacked to unstacked: a list of per-layer trees, what decoding unrolls over (design.md 5)."""
    leaves, tree = jax.tree.flatten(params["layers"])
    return {**params, "layers": [jax.tree.unflatten(tree, layer) for layer in zip(*leaves, strict=True)]}


# Projections of one input that decoding keeps as one kernel: module, fused name, parts in order.
FUSED_PROJECTIONS = (
    ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
)


@jax.jit
def side_by_side(*matrices: jax.Array) -> jax.Array:
    """The columns of several matrices in one; on a mesh each device puts those together that it has."""
    return on_each_device(lambda *parts: jnp.concatenate(parts, axis=-1), *matrices, like=matrices[0])


def fuse_projections(params: Params) -> Params:
    """Put q, k, v and gate, up side by side in one kernel each, what decoding runs (stacked or unstacked layers).

    One wide product of a few rows runs nearer to the memory bandwidth than several narrow ones. Layers are replaced in
    ``params`` one after the other, so that only one is ever held twice.
    """

    def fuse(layer: Params) -> Params:
        fused = dict(layer)
        for module, name, parts in FUSED_PROJECTIONS:
            trees = [layer[module][part] for part in parts]
            rest = {key: value for key, value in layer[module].items() if key not in parts}
            fused[module] = {**rest, name: jax.tree.map(side_by_side, *trees)}
        return fused

    return _replace_layers(params, fuse)


def split_projections(params: Params, config: ModelConfig) -> Params:
    """The inverse of ``fuse_projections`` on one device; also replaces the layers in ``params``."""
    columns = {weight.path.split(".")[-2]: weight.shape[-1] for weight in layer_weights(config, 0)}

    def split(layer: Params) -> Params:
        apart = dict(layer)
        for module, name, parts in FUSED_PROJECTIONS:
            ends = list(itertools.accumulate(columns[part] for part in parts))[:-1]
            rest = {key: value for key, value in layer[module].items() if key != name}
            leaves = {key: jnp.split(leaf, ends, axis=-1) for key, leaf in layer[module][name].items()}
            for i, part in enumerate(parts):
                rest[part] = {key: pieces[i] for key, pieces in leaves.items()}
            apart[module] = rest
        return apart

    return _replace_layers(params, split)


def _replace_layers(params: Params, change: Callable[[Params], Params]) -> Params:
    if is_stacked(params):
        params["layers"] = change(params["layers"])
    else:
        for i, layer in enumerate(params["layers"]):
            params["layers"][i] = change(layer)
    return params


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether the layers of a tree are stacked."""
    return isinstance(params["layers"], Mapping)
