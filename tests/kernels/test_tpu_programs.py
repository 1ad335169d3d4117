"""Whole programs compiled for TPUs that are not there: a round of decoding and a training step at Qwen3-8B's widths."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import pallas_kernels
from idlm_jax.backbone.adapter import Adapter, AdapterConfig, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES
from idlm_jax.backbone.weights import fuse_projections, init_params
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.decoding.cache import PAGE
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import idle_state
from idlm_jax.decoding.paged import idle_paged_state
from idlm_jax.decoding.step import decode_round
from idlm_jax.training.config import Stage, TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.params import ModelBuilder, trained_names
from idlm_jax.training.step import init_state, make_optimizer, make_train_step, objective_of
from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES, SOFT_LOSSES
from pallas_kernels.verify.api import draft, verify
from pallas_kernels.verify.reference import COUPLINGS
from tests.kernels.tpu import CHIPS, chips, needs_libtpu

pytestmark = [pytest.mark.aot, needs_libtpu]

MODEL = Path(__file__).parents[2] / "configs" / "models" / "qwen3-8b.yaml"
CONFIG = ModelConfig.from_hf(load_yaml(MODEL)).replace(num_hidden_layers=2, mask_token_id=16)
ADAPTER = AdapterConfig(rank=128, alpha=256)
BF16 = jnp.bfloat16


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: "tpu")
    monkeypatch.setattr(pallas_kernels, "BY_DEFAULT", True)


def one_chip(name):
    return SingleDeviceSharding(chips(name)[0])


def placed(sharding, make):
    """The shapes of what a function returns."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def kernels(compiled):
    """How often each Pallas kernel is called."""
    calls = re.findall(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"', compiled.as_text())
    return Counter(name.split("/")[-2] for name in calls)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("paged", [False, True])
def test_a_round_of_decoding_has_one_kernel_a_layer(name, paged):
    policy, batch, slots = DecodeConfig(stride=4).policy(), 8, 1024

    def round_of(params, adapter, state):
        return decode_round(Qwen3(CONFIG, params, Adapter(ADAPTER, adapter)), state, policy)

    key, shapes = jax.random.key(0), partial(placed, one_chip(name))
    params = shapes(lambda: fuse_projections(init_params(CONFIG, key, BF16)))
    adapter = shapes(lambda: init_adapter(CONFIG, ADAPTER, key, BF16).params)
    of_model = SimpleNamespace(config=CONFIG, dtype=BF16)
    if paged:
        # Many more pages than the batch has: a copy of them would show.
        state = shapes(lambda: idle_paged_state(of_model, policy, batch, 1025, slots // PAGE, 256, 2))
    else:
        state = shapes(lambda: idle_state(of_model, policy, [(batch, slots)], 256, 2))
    compiled = jax.jit(round_of, donate_argnums=2).lower(params, adapter, state).compile()
    assert kernels(compiled) == {"window_attention": 2}
    # Logits and what verification makes of them; no second cache.
    logits = 4 * batch * 7 * CONFIG.vocab_size
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * logits


@pytest.mark.parametrize(
    ("name", "size", "mesh_shape"),
    [("v5e", "1x1", (1, 1, 1)), ("v6e", "1x1", (1, 1, 1)), ("v5e", "2x2", (1, 2, 2))],
)
def test_a_training_step_has_the_kernels_of_both_streams(name, size, mesh_shape):
    """Forward of the frozen clean stream; forward, forward again and gradient of the noisy one; no gradient of keys."""
    mesh = Mesh(np.reshape(chips(name, size), mesh_shape), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    rows = mesh.shape["fsdp"]
    config = TrainConfig("", (), "", stages=(Stage(10, 3, "tv"),), length=4096, batch_size=rows)
    builder, optimizer = ModelBuilder(CONFIG, ADAPTER), make_optimizer(config)
    shapes, places = builder.shapes(), builder.shardings(mesh)
    trained = trained_names(shapes, config.mode, ())

    def weights(names, dtype):
        return {name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=places[name]) for name in names}

    def tokens(dtype=jnp.int32):
        sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, None))
        return jax.ShapeDtypeStruct((1, rows, config.length), dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        state = jax.eval_shape(partial(init_state, optimizer=optimizer), weights(trained, jnp.float32))
        frozen = weights(shapes.keys() - set(trained), BF16)
        batch = Batch(tokens(), tokens(), tokens(), tokens(bool))
        step = make_train_step(builder, objective_of(config, config.stages[0]), optimizer, seed=0)
        compiled = step.lower(state, frozen, batch).compile()
    assert kernels(compiled) == {"forward_kernel": 3, "backward_rows_kernel": 1}
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 15 * 2**30


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_verification_in_plain_jax_compiles(name, coupling):
    policy, batch, shapes = DecodeConfig(stride=4, coupling=coupling).policy(), 64, partial(placed, one_chip(name))
    of_model = SimpleNamespace(config=CONFIG.replace(num_hidden_layers=1), dtype=BF16)
    state = shapes(lambda: idle_state(of_model, policy, [(batch, 32)], 32, 2))
    logits = shapes(lambda: jnp.zeros((batch, 7, CONFIG.vocab_size)))

    def both(logits, state):
        positions = state.emitted[:, None] + jnp.arange(4)
        rows = jnp.broadcast_to(jnp.arange(4, 7), (batch, 3))
        drafts = draft(logits, rows, state.filters, policy.coupling, positions[:, :-1], 16)
        return drafts, verify(logits, state.filters, policy.coupling, drafts, state.warm, positions, 16)

    compiled = jax.jit(both).lower(logits, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 4 * logits.size


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_losses_of_16k_rows_compile(name, loss):
    def value(hidden, head, targets, weights, teacher):
        return linear_cross_entropy(loss, hidden, head, targets, weights, teacher)[0][0]

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    sharding, rows = one_chip(name), (4, 4096)
    hidden, head = shape(BF16, *rows, CONFIG.hidden_size), shape(BF16, CONFIG.vocab_size, CONFIG.hidden_size)
    given = (
        hidden,
        head,
        shape(jnp.int32, *rows),
        shape(jnp.float32, 1, *rows),
        hidden if loss in SOFT_LOSSES else None,
    )
    compiled = jax.jit(jax.value_and_grad(value)).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.6e9
