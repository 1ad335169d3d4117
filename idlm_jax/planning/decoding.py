"""A round of decoding over a full cache, compiled for devices that are not there."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from idlm_jax.backbone.adapter import Adapter, AdapterConfig, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import adapter_sharding, device_mesh, weight_sharding
from idlm_jax.backbone.weights import Params, abstract_params, build_params, parameter_count
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.admission import MOST_END_TOKENS
from idlm_jax.decoding.cache import cache_bytes
from idlm_jax.decoding.forward import prepare
from idlm_jax.decoding.generate import idle_state
from idlm_jax.decoding.step import DecodeState, Policy, decode_rounds
from idlm_jax.decoding.window import window_rows
from idlm_jax.errors import UserError
from idlm_jax.evaluation.step_cost import Shape, demand
from idlm_jax.planning.report import Report, examine
from idlm_jax.planning.targets import Target, compiling_for
from idlm_jax.training.plan import device_bytes

_DTYPE = jnp.dtype(jnp.bfloat16)
# Share of the memory that weights and cache may take where the mesh is proposed: the rest is for what a round holds.
_SHARE = 0.85


@dataclass(frozen=True)
class Workload:
    """What is decoded."""

    policy: Policy
    # Requests at once, on all devices, and the tokens that each has in the cache.
    batch: int
    context: int
    # Of a gated adapter; 0 is none.
    rank: int = 0

    @property
    def slots(self) -> int:
        """Cache slots of a request: its tokens and a window."""
        return self.context + window_rows(self.policy.layout, self.policy.stride)


def plan_decoding(model: ModelConfig, work: Workload, target: Target, tp: int | None) -> Report:
    """What a round takes there, with weights and heads split over ``tp`` chips, requests over the others.

    Raises UserError.
    """
    if model.mask_token_id is None:
        model = model.replace(mask_token_id=model.vocab_size - 1)
    tp = proposed_tp(model, work, target) if tp is None else tp
    data = target.count // tp
    if tp < 1 or target.count % tp or model.num_key_value_heads % tp:
        raise UserError(f"--tp {tp} must divide {target.name}'s chips and the {model.num_key_value_heads} key heads")
    if work.batch % data:
        raise UserError(f"a batch of {work.batch} cannot be split over {data} chips (with tp={tp}); give another --tp")
    with compiling_for(target) as devices:
        if target.count == 1:
            return _examine(model, work, target, SingleDeviceSharding(devices[0]), None)
        mesh = device_mesh((data, 1, tp), devices)
        with jax.set_mesh(mesh):
            return _examine(model, work, target, NamedSharding(mesh, PartitionSpec()), mesh)


def proposed_tp(model: ModelConfig, work: Workload, target: Target) -> int:
    """The fewest chips to split the model over such that weights and cache leave room; all if none do."""
    fitting = [
        tp
        for tp in range(1, target.count + 1)
        if target.count % tp == 0 and model.num_key_value_heads % tp == 0 and work.batch % (target.count // tp) == 0
    ]
    if not fitting:
        raise UserError(
            f"a batch of {work.batch} cannot be split over the chips of {target.name}; give another --batch"
        )
    weights = parameter_count(model) * _DTYPE.itemsize
    cache = cache_bytes(model, work.batch, work.slots, _DTYPE) / target.count
    return next((tp for tp in fitting if weights / tp + cache <= _SHARE * target.chip.memory), fitting[-1])


def _examine(model: ModelConfig, work: Workload, target: Target, everywhere: Sharding, mesh: Mesh | None) -> Report:
    params, adapter = _weights(model, work.rank, everywhere, mesh)
    state = _state(model, work, everywhere)
    settings = _adapter_config(work.rank)

    def rounds(params: Params, adapter: Any, state: DecodeState, count: jax.Array) -> DecodeState:
        loaded = None if adapter is None else Adapter(settings, adapter)
        return decode_rounds(Qwen3(model, params, loaded), state, count, work.policy)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    lowered = jax.jit(rounds, donate_argnums=2).lower(params, adapter, state, count)
    given = {
        "weights": device_bytes((params, adapter)),
        "KV cache": device_bytes(state.cache),
        "requests": device_bytes(jax.tree.map(_of_keys, replace(state, cache=()))),
    }
    rows = window_rows(work.policy.layout, work.policy.stride)
    flops = demand(model, Shape(work.batch, rows, work.context, work.rank), _DTYPE)[1] / target.count
    shape = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if axis != "fsdp") if mesh else "one chip"
    return examine(lowered, target, shape, work.batch * work.policy.stride, given, flops)


def _adapter_config(rank: int) -> AdapterConfig:
    return AdapterConfig(rank, 2 * rank)


def _weights(model: ModelConfig, rank: int, everywhere: Sharding, mesh: Mesh | None) -> tuple[Params, Any]:
    """Shapes of the parameters and of an adapter's, as ``load`` makes them."""
    settings, params = _adapter_config(rank), abstract_params(model, _DTYPE)
    adapter = None
    if rank:
        shapes = jax.eval_shape(lambda: init_adapter(model, settings, jax.random.key(0), _DTYPE).params)
        adapter = Adapter(settings, shapes)

    def place(leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if mesh is not None:
        params = jax.tree.map(place, params, build_params(model, weight_sharding(mesh)))
        if adapter:
            adapter = Adapter(settings, jax.tree.map(place, adapter.params, adapter_sharding(model, adapter, mesh)))

    def prepared(params: Params, matrices: Any) -> tuple[Params, Any]:
        params, made = prepare(model, params, Adapter(settings, matrices) if adapter else None)
        return params, made.params if made else None

    return _placed(everywhere, prepared, params, adapter.params if adapter else None)


def _state(model: ModelConfig, work: Workload, everywhere: Sharding) -> DecodeState:
    """Shapes of a batch whose requests have each its place in the cache."""
    of_model = cast("Qwen3", SimpleNamespace(config=model, dtype=_DTYPE))
    pools = [(work.batch, work.slots)]
    return _placed(everywhere, lambda: idle_state(of_model, work.policy, pools, work.slots, MOST_END_TOKENS))


def _placed(everywhere: Sharding, make: Callable[..., Any], *arguments: Any) -> Any:
    """The shapes of what a function returns, where it says or else everywhere."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = everywhere
        if isinstance(everywhere, NamedSharding) and x.sharding is not None:
            sharding = NamedSharding(everywhere.mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(make, *arguments))


def _of_keys(x: Any) -> Any:
    """Random keys as the numbers they are made of."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return jax.ShapeDtypeStruct((*x.shape, 2), jnp.uint32, sharding=x.sharding)
