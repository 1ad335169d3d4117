"""One forward pass over a window of every request and its cache: the model's own, or the same by few launches.

At the few rows of a window a step waits for launches. Where the kernels of ``pallas_kernels.decode_layer`` run, each
layer is its four products, its attention, and one kernel in each gap between them; on a mesh each device does that with
its heads and its part of the MLP, and two sums a layer go round.
"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.backbone.adapter import Adapter, absorb
from idlm_jax.backbone.layers import AdaptedLinear, FusedLinear, Linear, rope_tables, split_axes, widths_here
from idlm_jax.backbone.qwen3 import Attention, Block, Qwen3
from idlm_jax.backbone.weights import Params, fuse_projections
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.cache import Cache, LayerCache, attend_window, cached_attention, over_pools
from pallas_kernels.decode_attention.api import packed_window_attention, packing
from pallas_kernels.decode_layer.api import by_default, choose
from pallas_kernels.decode_layer.product import Expand, Normed, Product, multiply
from pallas_kernels.decode_layer.reference import scale_rows
from pallas_kernels.dispatch import on_each_device


def prepare(config: ModelConfig, params: Params, adapter: Adapter | None) -> tuple[Params, Adapter | None]:
    """Weights and adapter in the form in which this machine decodes fastest; the layers in ``params`` are replaced.

    What lies on a mesh is prepared under it, each device's part where it is.
    """
    params = fuse_projections(params)
    if adapter and by_default(params["embed_tokens"]["embedding"].dtype):
        adapter = absorb(config, params, adapter)
    return params, adapter


def forward(
    model: Qwen3,
    tokens: Int[Array, "B W"],
    positions: Int[Array, "B W"],
    length_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    cache: Cache,
    adapter_from: int | None = None,
    kernels: str = "auto",
    pages_BN: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B W D"], Cache]:
    """Final hidden states of the windows, and the cache with their keys and values at slots ``length …``.

    Every row sees the slots before its request's length and, inside the window, what the mask (row, key) allows. Of a
    paged cache ``pages`` are those of each request. On a mesh a request's window goes where its cache lies.
    """
    dtype = cache[0][0].dtype
    axes = split_axes(cache[0][0])
    if axes is not None:
        own = (tokens, positions, length_B, mask_BWW)
        tokens, positions, length_B, mask_BWW = jax.reshard(own, PartitionSpec(axes[0]))
    if choose(kernels, tokens, dtype, model.config.head_dim, partial(_lacking, model, dtype)) == "xla":
        return model(tokens, positions, cached_attention(length_B, mask_BWW, kernels, pages_BN), cache, adapter_from)
    from pallas_kernels.decode_layer import gpu  # needs the optional packages

    return forward_by(gpu, model, tokens, positions, length_B, mask_BWW, cache, adapter_from, kernels, pages_BN)


def _lacking(model: Qwen3, dtype: jnp.dtype) -> str | None:
    if model.dtype != dtype:
        return f"a cache of {dtype} beside weights of {model.dtype}"
    if isinstance(model.layers, Block):
        return "stacked layers"
    layer = model.layers[0]
    inputs = (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj)
    if not all(isinstance(linear, FusedLinear | AdaptedLinear) for linear in inputs):
        return "projections that are not fused"
    outputs = (layer.self_attn.o_proj, layer.mlp.down_proj)
    if any(isinstance(linear, Linear) and linear.lora is not None for linear in outputs) or any(
        isinstance(linear, FusedLinear) and any(lora is not None for lora in linear.loras) for linear in inputs
    ):
        return "an adapter that is not absorbed"
    if jax.typeof(model.embedding[...]).sharding.mesh.shape.get("fsdp", 1) > 1:
        return "weights split over the axis fsdp"
    return None


def forward_by(
    operations: ModuleType,
    model: Qwen3,
    tokens: Int[Array, "B W"],
    positions: Int[Array, "B W"],
    length_B: Int[Array, " B"],
    mask_BWW: Bool[Array, "B W W"],
    cache: Cache,
    adapter_from: int | None,
    kernels: str,
    pages_BN: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B W D"], Cache]:
    """``forward`` with the given operations between products: the kernels or their reference."""
    rows, epsilon = tokens.shape[1], model.config.rms_norm_eps
    gate = rows if adapter_from is None else min(adapter_from, rows)
    x = model.embed(tokens, adapter_from)
    cos, sin = rope_tables(model.config.rope, model.config.head_dim, positions)
    layers = cast("Sequence[Block]", model.layers)
    over_o, over_down = (_split_over(linear) for linear in (layers[0].self_attn.o_proj, layers[0].mlp.down_proj))

    def through(
        x: Array, cache: Cache, layers: Sequence[Block], last_scale: Array, tables: tuple[Array, Array], *window: Any
    ) -> tuple[Array, Cache]:
        first_scale, *next_scales = *(block.input_layernorm.scale[...] for block in layers), last_scale
        normed = scale_rows(x, first_scale)
        new_cache = []
        for block, next_scale, state in zip(layers, next_scales, cache, strict=True):
            attention, mlp = block.self_attn, block.mlp
            product = _product(cast("FusedLinear", attention.qkv_proj), normed, gate, epsilon)
            out, state = _attend(operations, attention, product, tables, state, kernels, *window)
            product = _product(attention.o_proj, out, gate, epsilon, over_o)
            x, normed = operations.add(x, product, block.post_attention_layernorm.scale[...])
            product = _product(cast("FusedLinear", mlp.gate_up_proj), normed, gate, epsilon)
            hidden = operations.gated(product, x.dtype)
            product = _product(mlp.down_proj, hidden, gate, epsilon, over_down)
            x, normed = operations.add(x, product, next_scale)
            new_cache.append(state)
        return x, tuple(new_cache)

    of_model = model.layers, model.norm.scale[...], (cos[:, :, 0], sin[:, :, 0])
    x, cache = on_each_device(through, x, cache, *of_model, length_B, mask_BWW, pages_BN, like=(x, cache))
    return model.norm(x), cache


def _split_over(linear: Linear | AdaptedLinear) -> str | None:
    """The mesh axis whose devices have a part of the inputs of a projection each."""
    sharding = jax.typeof(linear.kernel[...]).sharding
    axis = sharding.spec[0]
    return axis if sharding.mesh.shape.get(axis, 1) > 1 else None


def _product(
    linear: Linear | FusedLinear | AdaptedLinear,
    x: Array | Normed,
    gate: int,
    epsilon: float,
    split_over: str | None = None,
) -> Product:
    """The unfinished product of a projection, its adapter acting from window row ``gate`` on."""
    rows = (x.values_BWD if isinstance(x, Normed) else x).shape[1]
    kernel, bias = linear.kernel[...], None if linear.bias is None else linear.bias[...]
    expand, columns = None, kernel.shape[1]
    if isinstance(linear, AdaptedLinear):
        columns = linear.b.shape[1]
        if gate < rows:
            expand = Expand(linear.b[...], linear.lora_scale, gate, widths_here(linear.widths, columns))
    return multiply(x, kernel, bias, expand, columns, epsilon, split_over)


def _attend(
    operations: ModuleType,
    attention: Attention,
    product: Product,
    tables: tuple[Array, Array],
    state: LayerCache,
    kernels: str,
    length_B: Array,
    mask_BWW: Array,
    pages_BN: Array | None,
) -> tuple[Float[Array, "B W O"], LayerCache]:
    """Attention of one layer, pool by pool."""
    scales = None
    if attention.q_norm is not None and attention.k_norm is not None:
        scales = attention.q_norm.scale[...], attention.k_norm.scale[...]

    def attend(pool: slice, keys: Array, values: Array) -> tuple[Array, Array, Array]:
        _, heads, _, size = keys.shape
        mask, length = mask_BWW[pool], length_B[pool]
        q_shape = *mask.shape[:2], product.columns // size - 2 * heads, size
        pack = packing(kernels, jax.ShapeDtypeStruct(q_shape, keys.dtype), keys, pages_BN is not None)
        q, keys, values = operations.rotate_and_store(
            product, scales, tables, keys, values, length_B, pool.start, pack, pages_BN
        )
        if pack is None:
            out = attend_window(q, keys, values, pages_BN, length, mask, kernels)
        else:
            out = packed_window_attention(q, keys, values, pages_BN, length, mask, pack)
        return out, keys, values

    out, state = over_pools(attend, state, pages_BN)
    return out.reshape(*out.shape[:2], -1), state
