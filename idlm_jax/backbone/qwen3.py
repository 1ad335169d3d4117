"""The decoder-only transformer of the Qwen3, SDAR, Qwen2 and Llama families, in Flax NNX.

The module knows nothing of caches and masks: whoever runs it passes ``attend``, which sees the queries, keys and values
of one layer (after qk-norm and RoPE) together with that layer's carried state, and returns the attention output and the
new state. A plain causal pass, chunked prefill, a decoding window and two-stream training differ only in ``attend``.
"""

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.adapter import Adapter
from idlm_jax.backbone.layers import (
    NORM,
    AdaptedLinear,
    FusedLinear,
    Linear,
    RMSNorm,
    Rope,
    apart,
    apply_rope,
    matmul,
    rms_norm,
    rope_tables,
    split_axes,
)
from idlm_jax.backbone.weights import Params, is_stacked
from idlm_jax.config import ModelConfig
from pallas_kernels.decode_attention.reference import window_attention
from pallas_kernels.range_attention.reference import RANGE_ATTENTION

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
# Name of the residual stream between attention and MLP, for policies of what to keep for the backward pass.
AFTER_ATTENTION = "after attention"
# Rows of the largest decoding window.
_FEW_ROWS = 64


class Attend(Protocol):
    """Attention of one layer over whatever keys the caller keeps."""

    def __call__(
        self,
        q: Float[Array, "B L H d"],
        k: Float[Array, "B L K d"],
        v: Float[Array, "B L K d"],
        state: Any,
    ) -> tuple[Float[Array, "B L H d"], Any]:
        """Return the attention output and the layer's new state."""
        ...


class Stream(NamedTuple):
    """Rows that pass through the layers together."""

    tokens: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    attend: Attend
    # The first row that runs with the adapter, None for the base alone.
    adapter_from: int | None = None


class Remat(enum.Enum):
    """What the backward pass computes again, a layer at a time."""

    # Nothing: every activation is kept.
    NONE = "none"
    # All but the results of matrix products and of attention.
    DOTS = "dots"
    # All but what attention gives, where the kernels for GPUs run, and the residual stream after it: of all products
    # the output projection is the most work for what it takes to keep.
    ATTENTION = "attention"
    # All: only the input of each layer is kept.
    BLOCK = "block"

    def wrap(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """``layer`` with this policy."""
        if self is Remat.NONE:
            return layer
        policies = jax.checkpoint_policies
        attention = policies.save_only_these_names(RANGE_ATTENTION, AFTER_ATTENTION, NORM)
        policy = {
            Remat.DOTS: policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention),
            Remat.ATTENTION: attention,
            Remat.BLOCK: None,
        }[self]
        # Inside a scan nothing can be merged with the first computation, so the barrier against it would only cost.
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


Projections = FusedLinear | AdaptedLinear | nnx.List[Linear]


def _projections(
    params: Params, fused: str, parts: Sequence[str], widths: Sequence[int], lora: dict, lora_scale: float
) -> Projections:
    """The projections of one input, as one kernel where the parameters hold them fused."""
    if fused in lora:
        return AdaptedLinear(params[fused], widths, lora[fused], lora_scale)
    if fused in params:
        return FusedLinear(params[fused], widths, [lora.get(part) for part in parts], lora_scale)
    return nnx.List([Linear(params[part], lora.get(part), lora_scale) for part in parts])


def _project(projections: Projections, x: Float[Array, "B L I"], adapter_from: int | None) -> list[Array]:
    if isinstance(projections, AdaptedLinear):
        return apart(projections(x, adapter_from), projections.widths)
    if isinstance(projections, FusedLinear):
        return projections(x, adapter_from)
    return [linear(x, adapter_from) for linear in projections]


def _projection(params: Params, lora: dict | None, lora_scale: float, width: int) -> Linear | AdaptedLinear:
    if lora is not None and "a" not in lora:
        return AdaptedLinear(params, (width,), lora, lora_scale)
    return Linear(params, lora, lora_scale)


class Attention(nnx.Module):
    """Grouped-query attention with qk-norm before RoPE where the family has it (method.md 1.1)."""

    def __init__(self, config: ModelConfig, params: Params, lora: dict, lora_scale: float):
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.qkv_proj = _projections(params, "qkv_proj", QKV, (q_size, kv_size, kv_size), lora, lora_scale)
        self.o_proj = _projection(params["o_proj"], lora.get("o_proj"), lora_scale, config.hidden_size)
        self.q_norm = RMSNorm(params["q_norm"], config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(params["k_norm"], config.rms_norm_eps) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "B L D"], rope: Rope, attend: Attend, state: Any, adapter_from: int | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Project, rotate, attend, project back."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (part.reshape(heads) for part in _project(self.qkv_proj, x, adapter_from))
        q, k = self._norm_and_rotate(q, k, rope)
        out, state = attend(q, k, v, state)
        return self.o_proj(out.reshape(*x.shape[:2], -1), adapter_from), state

    def _norm_and_rotate(
        self, q: Float[Array, "B L H d"], k: Float[Array, "B L K d"], rope: Rope
    ) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"]]:
        axes = split_axes(q)
        heads_are_split = axes is not None and axes[2] is not None  # side by side they would have to change devices
        if heads_are_split or q.shape[1] > _FEW_ROWS:
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            return apply_rope(q, rope), apply_rope(k, rope)
        # As one array: a decoding window waits for launches, not for bytes.
        qk = jnp.concatenate([q, k], axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            scales = [
                jnp.broadcast_to(norm.scale[...], (part.shape[2], self.head_dim))
                for norm, part in ((self.q_norm, q), (self.k_norm, k))
            ]
            qk = rms_norm(qk, jnp.concatenate(scales), self.q_norm.epsilon)
        q, k = jnp.split(apply_rope(qk, rope), [q.shape[2]], axis=2)
        return q, k


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, params: Params, lora: dict, lora_scale: float):
        widths = (config.intermediate_size,) * 2
        self.gate_up_proj = _projections(params, "gate_up_proj", GATE_UP, widths, lora, lora_scale)
        self.down_proj = _projection(params["down_proj"], lora.get("down_proj"), lora_scale, config.hidden_size)

    def __call__(self, x: Float[Array, "B L D"], adapter_from: int | None) -> Float[Array, "B L D"]:
        """Apply the three projections."""
        gate, up = _project(self.gate_up_proj, x, adapter_from)
        return self.down_proj(jax.nn.silu(gate) * up, adapter_from)


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, params: Params, lora: dict, lora_scale: float):
        self.input_layernorm = RMSNorm(params["input_layernorm"], config.rms_norm_eps)
        self.self_attn = Attention(config, params["self_attn"], lora.get("self_attn", {}), lora_scale)
        self.post_attention_layernorm = RMSNorm(params["post_attention_layernorm"], config.rms_norm_eps)
        self.mlp = MLP(config, params["mlp"], lora.get("mlp", {}), lora_scale)

    def __call__(
        self, x: Float[Array, "B L D"], rope: Rope, attend: Attend, state: Any, adapter_from: int | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Attention and MLP, each added to the residual stream."""
        out, state = self.self_attn(self.input_layernorm(x), rope, attend, state, adapter_from)
        x = checkpoint_name(x + out, AFTER_ATTENTION)
        return x + self.mlp(self.post_attention_layernorm(x), adapter_from), state


class Qwen3(nnx.Module):
    """The whole model, built around a parameter tree (``weights.py``) with stacked or unstacked layers.

    The layers of ``adapter``, if there is one, are stacked or unstacked like the parameters; its mask embedding
    replaces the embedding of the mask token on adapted rows. ``remat`` says what the backward pass of stacked layers
    computes again instead of keeping it.
    """

    def __init__(self, config: ModelConfig, params: Params, adapter: Adapter | None = None, remat: Remat = Remat.NONE):
        self.config = config
        self.remat = remat
        self.embedding = nnx.Param(params["embed_tokens"]["embedding"])
        lora = adapter.params["layers"] if adapter else None
        lora_scale = adapter.config.scale if adapter else 1.0
        if is_stacked(params):
            self.layers = Block(config, params["layers"], lora or {}, lora_scale)
        else:
            per_layer = zip(params["layers"], lora or [{}] * config.num_hidden_layers, strict=True)
            self.layers = nnx.List([Block(config, layer, layer_lora, lora_scale) for layer, layer_lora in per_layer])
        self.norm = RMSNorm(params["norm"], config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nnx.Param(params["lm_head"]["kernel"])
        mask_embedding = adapter.params.get("mask_embedding") if adapter else None
        self.mask_embedding = None if mask_embedding is None else nnx.LoRAParam(mask_embedding)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of parameters and activations."""
        return self.embedding[...].dtype

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the weights lie on, None if they are on one device."""
        mesh = getattr(self.embedding[...].sharding, "mesh", None)
        return mesh if isinstance(mesh, Mesh) else None

    def on_its_mesh(self) -> AbstractContextManager:
        """Where its programs are called: under its mesh, which JAX sets for each thread anew; without one, anywhere."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        attend: Attend,
        states: Any,
        adapter_from: int | None = None,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Final hidden states (after the last norm) and the new per-layer states.

        ``states`` has one entry a layer (unstacked), one tree with a leading layer axis (stacked), or is None where
        ``attend`` carries nothing. Rows from ``adapter_from`` on run with the adapter; ``None`` runs the base alone.
        """
        (hidden,), states = self.streams([Stream(tokens, positions, attend, adapter_from)], states)
        return hidden, states

    def streams(
        self, streams: Sequence[Stream], states: Any, keep_states: bool = False
    ) -> tuple[tuple[Float[Array, "B L D"], ...], Any]:
        """As ``__call__``, for several streams: in every layer the state of each goes to the next, the last one's out.

        Stacked layers compute states again in the backward pass, unless ``keep_states``: that is for streams without
        gradient before the last, of which then nothing else is kept.
        """
        ropes = [rope_tables(self.config.rope, self.config.head_dim, stream.positions) for stream in streams]
        xs = tuple(self.embed(stream.tokens, stream.adapter_from) for stream in streams)

        def pass_through(block: Block, x: Array, rope: Rope, stream: Stream, state: Any) -> tuple[Array, Any]:
            return block(x, rope, stream.attend, state, stream.adapter_from)

        def apply(xs: tuple[Array, ...], layer: tuple[Block, Any]) -> tuple[tuple[Array, ...], Any]:
            block, state = layer
            new = []
            for x, rope, stream in zip(xs, ropes, streams, strict=True):
                run = partial(pass_through, rope=rope, stream=stream)
                x, state = (self.remat.wrap(run) if keep_states else run)(block, x, state=state)
                new.append(x)
            return tuple(new), state

        if isinstance(self.layers, Block):
            xs, states = jax.lax.scan(apply if keep_states else self.remat.wrap(apply), xs, (self.layers, states))
        else:
            new_states = []
            for block, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
                xs, state = apply(xs, (block, state))
                new_states.append(state)
            states = tuple(new_states)
        return tuple(self.norm(x) for x in xs), states

    def embed(self, tokens: Int[Array, "B L"], adapter_from: int | None) -> Float[Array, "B L D"]:
        """Embeddings of the tokens; from row ``adapter_from`` on, mask tokens have the adapter's."""
        axes, table = split_axes(tokens), self.embedding[...]
        if axes is not None:
            # Whole rows first: looking up slices of rows would leave every token's embedding spread over devices.
            table = jax.reshard(table, PartitionSpec(jax.typeof(table).sharding.spec[0], None))
        sharding, whole = (None, None) if axes is None else (PartitionSpec(*axes, None), PartitionSpec(None, None))
        mask_token_id = self.config.mask_token_id
        if mask_token_id is None:
            return _look_up(table, tokens, sharding)
        is_mask = tokens == mask_token_id
        if self.mask_embedding is not None:
            x = _look_up(table, tokens, sharding)
            if adapter_from is None:
                return x
            is_mask &= jnp.arange(tokens.shape[1]) >= adapter_from
            return jnp.where(is_mask[:, :, None], self.mask_embedding[...].astype(x.dtype), x)
        # Nothing is looked up for mask tokens: gradients of so many rows would queue for one row of the table.
        others = jnp.where(is_mask, table.shape[0], tokens)
        x = _look_up(table, others, sharding, "fill")
        # An array as index: the gradient of a scalar one loses the table's split over devices (jax 0.11.2).
        mask = table.at[jnp.array([mask_token_id])].get(out_sharding=whole)
        return jnp.where(is_mask[:, :, None], mask, x)

    def head(self) -> Float[Array, "V D"]:
        """The matrix whose rows are multiplied with a hidden state to give the logits."""
        return self.embedding[...] if self.lm_head is None else self.lm_head[...].T

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Next-token logits in float32: products in the model's dtype, sums in float32.

        On a mesh each device has its part of the vocabulary.
        """
        return matmul(hidden, self.head().T, jnp.float32)


def _look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B L"], sharding: PartitionSpec | None, mode: str | None = None
) -> Float[Array, "B L D"]:
    """Rows of the table; ``mode`` says what stands beyond its end."""
    if sharding is None or tokens.size > 1:
        return table.at[tokens].get(mode=mode, out_sharding=sharding)
    # XLA for GPUs makes a slice of a lookup of one row, and gathers the table from all devices for it.
    return table.at[jnp.tile(tokens, 2)].get(mode=mode, out_sharding=sharding)[:, :1]


def causal_attention(batch: int, length: int) -> Attend:
    """Attention of a plain causal pass without a cache."""
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    no_prefix = jnp.zeros((batch,), jnp.int32)

    def attend(q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        return window_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), no_prefix, causal), state

    return attend


def causal_logits(model: Qwen3, tokens: Int[Array, "B L"], adapter_from: int | None = None) -> Float[Array, "B L V"]:
    """Logits of a plain causal pass without a cache: row i predicts token i + 1."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(tokens, positions, causal_attention(*tokens.shape), None, adapter_from)
    return model.logits(hidden)
