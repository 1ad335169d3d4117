"""One forward pass over a window of every request and its cache: the model's own, or the same by few launches.

At the few rows of a window a step waits for launches. Where the kernels of ``pallas_kernels.decode_layer`` run, each
layer is its four products, its attention, and one kernel in each gap between them.
"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.backbone.layers import AdaptedLinear, FusedLinear, Linear, rope_tables, split_axes
from idlm_jax.backbone.qwen3 import Attention, Block, Qwen3
from idlm_jax.decoding.cache import Cache, LayerCache, attend_window, cached_attention, over_pools
from pallas_kernels.decode_attention.api import packed_window_attention, packing
from pallas_kernels.decode_layer.api import choose
from pallas_kernels.decode_layer.product import Expand, Normed, Product, multiply
from pallas_kernels.decode_layer.reference import scale_rows


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
    rows = tokens.shape[1]
    gate = rows if adapter_from is None else min(adapter_from, rows)
    x = model.embed(tokens, adapter_from)
    cos, sin = rope_tables(model.config.rope, model.config.head_dim, positions)
    tables = cos[:, :, 0], sin[:, :, 0]
    layers = cast("Sequence[Block]", model.layers)
    first_scale, *next_scales = (norm.scale[...] for norm in (*(block.input_layernorm for block in layers), model.norm))
    normed = scale_rows(x, first_scale)
    epsilon, new_cache = model.config.rms_norm_eps, []
    for block, next_scale, state in zip(layers, next_scales, cache, strict=True):
        attention, mlp = block.self_attn, block.mlp
        product = _product(cast("FusedLinear", attention.qkv_proj), normed, gate, epsilon)
        out, state = _attend(operations, attention, product, tables, length_B, mask_BWW, state, kernels, pages_BN)
        product = _product(attention.o_proj, out, gate, epsilon)
        x, normed = operations.add(x, product, block.post_attention_layernorm.scale[...])
        product = _product(cast("FusedLinear", mlp.gate_up_proj), normed, gate, epsilon)
        hidden = operations.gated(product, x.dtype)
        x, normed = operations.add(x, _product(mlp.down_proj, hidden, gate, epsilon), next_scale)
        new_cache.append(state)
    return model.norm(x), tuple(new_cache)


def _product(linear: Linear | FusedLinear | AdaptedLinear, x: Array | Normed, gate: int, epsilon: float) -> Product:
    """The unfinished product of a projection, its adapter acting from window row ``gate`` on."""
    rows = (x.values_BWD if isinstance(x, Normed) else x).shape[1]
    kernel, bias = linear.kernel[...], None if linear.bias is None else linear.bias[...]
    expand, columns = None, kernel.shape[1]
    if isinstance(linear, AdaptedLinear):
        columns = sum(linear.widths)
        if gate < rows:
            expand = Expand(linear.b[...], linear.lora_scale, gate, linear.widths)
    return multiply(x, kernel, bias, expand, columns, epsilon)


def _attend(
    operations: ModuleType,
    attention: Attention,
    product: Product,
    tables: tuple[Array, Array],
    length_B: Array,
    mask_BWW: Array,
    state: LayerCache,
    kernels: str,
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
