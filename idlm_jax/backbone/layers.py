"""The building blocks: RMSNorm, rotary embedding, and a Linear whose LoRA adapter is gated by row.

Numerics: parameters and activations are bfloat16 or float32; norms, rotary tables and logits are computed in float32;
float32 matrix products really are float32 (``Precision.HIGHEST``: accelerators would otherwise round to tf32 or bf16).
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from idlm_jax.config import RopeConfig
from pallas_kernels.dispatch import on_each_device

# Name of the norms' mean squares, for policies of what to keep for the backward pass.
NORM = "norm"
Rope = tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]


def split_axes(x: Array) -> tuple | None:
    """The mesh axes over which each axis of ``x`` is split, None without a mesh (design.md 9: Explicit axes)."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else tuple(sharding.spec)


def matmul(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows O"]:
    """``x @ kernel`` in the dtype of ``x``, or summed in ``dtype``; float32 is multiplied in float32 on every platform.

    On a mesh the rows stay where they are: a kernel split over the mesh axes of the batch is gathered, and where the
    summed axis is split (the second product of a tensor-parallel pair) the sum is whole on each device.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sharding = _product_sharding(x, kernel)
    return jnp.matmul(x, kernel, precision=precision, preferred_element_type=dtype, out_sharding=sharding)


def _product_sharding(x: Array, kernel: Array) -> PartitionSpec | None:
    axes, kernel_axes = split_axes(x), split_axes(kernel)
    if axes is None or kernel_axes is None:
        return None
    of_rows = jax.tree.leaves(axes[:-1])
    columns = tuple(axis for axis in jax.tree.leaves(kernel_axes[-1]) if axis not in of_rows)
    return PartitionSpec(*axes[:-1], columns or None)


def rms_norm(x: Float[Array, "*rows D"], scale: Float[Array, "..."], epsilon: float) -> Float[Array, "*rows D"]:
    """Root-mean-square norm over the last axis: computed in float32, cast back, then scaled (method.md 1.1)."""
    x32 = x.astype(jnp.float32)
    mean_square = checkpoint_name(jnp.mean(jnp.square(x32), axis=-1, keepdims=True), NORM)
    normed = x32 * jax.lax.rsqrt(mean_square + epsilon)
    return scale * normed.astype(x.dtype)


class RMSNorm(nnx.Module):
    """A root-mean-square norm with a learned scale."""

    def __init__(self, params: dict, epsilon: float):
        self.scale = nnx.Param(params["scale"])
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise ``x``; the result has its dtype."""
        return rms_norm(x, self.scale[...], self.epsilon)


class LoRA(nnx.Module):
    """The low-rank term ``scale * (x a) b`` of an adapter, added to trailing rows only (method.md 4)."""

    def __init__(self, params: dict, scale: float):
        self.a = nnx.LoRAParam(params["a"])
        self.b = nnx.LoRAParam(params["b"])
        self.scale = scale

    def __call__(
        self, x: Float[Array, "B L I"], y: Float[Array, "B L O"], adapter_from: int | None
    ) -> Float[Array, "B L O"]:
        """Add the term to rows ``adapter_from`` and later of ``y``; ``None`` adds it to no row.

        The gate is a static row number, so rows before it run the very same arithmetic with and without an adapter.
        """
        if adapter_from is None or adapter_from >= x.shape[1]:
            return y
        delta = matmul(matmul(x[:, adapter_from:], self.a[...]), self.b[...])
        adapted = y[:, adapter_from:] + (self.scale * delta).astype(y.dtype)
        return jnp.concatenate([y[:, :adapter_from], adapted], axis=1)


class Linear(nnx.Module):
    """A dense layer ``x @ kernel + bias``, with the LoRA term of an adapter if there is one."""

    def __init__(self, params: dict, lora: dict | None = None, lora_scale: float = 1.0):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.lora = LoRA(lora, lora_scale) if lora else None

    def __call__(self, x: Float[Array, "B L I"], adapter_from: int | None = None) -> Float[Array, "B L O"]:
        """Apply the layer; rows ``adapter_from`` and later also get the adapter, ``None`` leaves it out."""
        y = matmul(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...]
        return y if self.lora is None else self.lora(x, y, adapter_from)


def widths_here(widths: Sequence[int], columns: int) -> tuple[int, ...]:
    """Of Linears side by side in so many columns, those of each: all of its own, or a device's part of all."""
    return tuple(width * columns // sum(widths) for width in widths)


def apart(y: Float[Array, "B L O"], widths: Sequence[int]) -> list[Float[Array, "B L O"]]:
    """The outputs of Linears that lie side by side; on a mesh each device has columns of all of them."""

    def split(y: Array) -> list[Array]:
        return jnp.split(y, list(itertools.accumulate(widths_here(widths, y.shape[-1])))[:-1], axis=-1)

    return on_each_device(split, y, like=[y] * len(widths))


class FusedLinear(nnx.Module):
    """Several Linears of the same input as one product; their adapters stay apart (``weights.fuse_projections``)."""

    def __init__(self, params: dict, widths: Sequence[int], loras: Sequence[dict | None], lora_scale: float):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.widths = tuple(widths)
        self.loras = nnx.List([LoRA(lora, lora_scale) if lora else None for lora in loras])

    def __call__(self, x: Float[Array, "B L I"], adapter_from: int | None = None) -> list[Float[Array, "B L O"]]:
        """The output of every part."""
        y = matmul(x, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...]
        parts = zip(apart(y, self.widths), self.loras, strict=True)
        return [part if lora is None else lora(x, part, adapter_from) for part, lora in parts]


class AdaptedLinear(nnx.Module):
    """One or several Linears of the same input as one product that begins their adapters too (``adapter.absorb``).

    After the columns of all Linears follow those of each adapter's first matrix. On a mesh that splits columns, each
    device has its part of the Linears and the whole of those.
    """

    def __init__(self, params: dict, widths: Sequence[int], lora: dict, lora_scale: float):
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        # The second matrices side by side.
        self.b = nnx.LoRAParam(lora["b"])
        self.lora_scale = lora_scale
        self.widths = tuple(widths)

    def __call__(self, x: Float[Array, "B L I"], adapter_from: int | None = None) -> Float[Array, "B L O"]:
        """The outputs side by side; rows ``adapter_from`` and later also get the adapters, ``None`` leaves them out."""
        y, bias = matmul(x, self.kernel[...]), None if self.bias is None else self.bias[...]
        return on_each_device(partial(self._finished, adapter_from), y, bias, self.b[...], like=y)

    def _finished(self, adapter_from: int | None, y: Array, bias: Array | None, b: Array) -> Float[Array, "B L O"]:
        y, shrunk = jnp.split(y, [b.shape[1]], axis=-1)
        if bias is not None:
            y = y + bias
        if adapter_from is None or adapter_from >= y.shape[1]:
            return y
        halves = zip(jnp.split(shrunk[:, adapter_from:], len(self.widths), axis=-1), apart(b, self.widths), strict=True)
        delta = jnp.concatenate([matmul(part, b_of_part) for part, b_of_part in halves], axis=-1)
        adapted = y[:, adapter_from:] + (self.lora_scale * delta).astype(y.dtype)
        return jnp.concatenate([y[:, :adapter_from], adapted], axis=1)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [head_dim / 2] float32 and the factor on cos and sin, as transformers computes them."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return (inverse / rope.factor).astype(np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse).astype(np.float32), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, head_dim).astype(np.float32), _yarn_attention_factor(rope)
    return inverse.astype(np.float32), 1.0


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed by ``factor``, short ones kept, those between interpolated."""
    turns = rope.original_max_position_embeddings * inverse / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * inverse / rope.factor + smooth * inverse


def _yarn(rope: RopeConfig, inverse: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071): a linear ramp over dimensions between interpolation and extrapolation."""

    def dimension_of(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
    interpolated = np.clip(ramp, 0.0, 1.0)
    return inverse / rope.factor * interpolated + inverse * (1 - interpolated)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def rope_tables(rope: RopeConfig, head_dim: int, positions: Int[Array, "B L"]) -> Rope:
    """cos and sin of every position, float32, with an axis for the heads."""
    inverse, factor = rope_frequencies(rope, head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: Float[Array, "B L H d"], tables: Rope) -> Float[Array, "B L H d"]:
    """Rotate-half rotary embedding in float32, cast back to the dtype of ``x``."""
    cos, sin = (table[..., None, :] for table in tables)
    # The halves on an axis of their own, turned around: unlike slices and concatenations, XLA fuses that and its
    # transpose with the norm's passes over the same array.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    turned = jnp.flip(halves, -2) * jnp.array([[-1.0], [1.0]], jnp.float32)
    return (halves * cos + turned * sin).astype(x.dtype).reshape(x.shape)
