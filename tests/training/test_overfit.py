"""A few steps on a short text: what is learnt by heart is drafted whole (issue 3, method.md 6.2)."""

import itertools
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.adapter import Adapter, AdapterConfig
from idlm_jax.backbone.qwen3 import Qwen3, Remat
from idlm_jax.backbone.weights import init_params, unstack_layers
from idlm_jax.decoding.generate import Emission, SamplingParams, generate_tokens, stats_from_history
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.evaluation.acceptance import Acceptance, measure
from idlm_jax.training.config import OptimizerSettings, Stage, TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.params import ADAPTER, Flat, ModelBuilder, flat_base, fresh_adapter, nest, split_trained
from idlm_jax.training.step import init_state, make_optimizer, make_train_step, objective_of
from tests.decoding.helpers import make_policy
from tests.decoding.support import tiny_config
from tests.training.support import KEY, batch_of

VOCAB, PROMPT, LENGTH, STEPS = 257, 4, 192, 50
CONFIG = tiny_config(
    VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=16, initializer_range=0.05
)
LORA = AdapterConfig(rank=32, alpha=64)


def memorised() -> Batch:
    """Two random texts; what follows their first tokens is learnt."""
    tokens = np.random.default_rng(0).integers(0, VOCAB - 1, (2, PROMPT + LENGTH))
    learnt = np.ones_like(tokens, bool)
    learnt[:, :PROMPT] = False
    return batch_of(tokens, learnt)


def train(mode: str, stage: Stage, params: Flat) -> Flat:
    """All weights after the steps of a stage on the memorised text."""
    settings = OptimizerSettings(1e-2, warmup=0.1, beta2=0.95, final=0.02)
    config = TrainConfig("", "", "", mode=mode, stages=(stage,), optimizer=settings, dtype="float32")
    adapter = LORA if mode == "gated-lora" else None
    builder = ModelBuilder(CONFIG, adapter, "float32", Remat.NONE)
    optimizer = make_optimizer(config)
    # A copy, since a step takes its state for itself.
    trained, frozen = split_trained(jax.tree.map(jnp.copy, params), mode, (), "float32")
    state = init_state(trained, optimizer)
    parts = jax.tree.map(lambda array: array[None], memorised())
    step = make_train_step(builder, objective_of(config, stage), optimizer, seed=0).lower(state, frozen, parts)
    step = step.compile({"xla_backend_optimization_level": 0})
    for _ in range(stage.steps):
        state, result = step(state, frozen, parts)
    assert bool(result.finite)
    return {**frozen, **state.params}


@cache
def full_model() -> Flat:
    params = flat_base(init_params(CONFIG, KEY, jnp.dtype(jnp.float32)))
    return train("full", Stage(STEPS, 3, "ce", 0.5, "random", 3.0), params)


@cache
def gated_model() -> Flat:
    """A base that knows the text, and an adapter that drafts it."""
    base = train("ar", Stage(STEPS), flat_base(init_params(CONFIG, KEY, jnp.dtype(jnp.float32))))
    builder = ModelBuilder(CONFIG, LORA)
    params = {**base, **fresh_adapter(builder, base["embed_tokens.embedding"], KEY)}
    return train("gated-lora", Stage(STEPS, 3, "kl", starts="random", density=3.0), params)


def acceptance_of(params: Flat, adapter: AdapterConfig | None) -> Sequence[Acceptance]:
    return measure(ModelBuilder(CONFIG, adapter, "float32"), params, [memorised()], 3).temperatures


def decoded(params: Flat, adapter: AdapterConfig | None, stride: int, layout: str) -> list[Emission]:
    """Greedy answers to the prompts, by the decoder."""
    tree = unstack_layers(nest(params))
    lora = tree.pop(ADAPTER, None)
    loaded = Adapter(adapter, unstack_layers(lora)) if adapter else None
    prompts = np.asarray(memorised().tokens)[:, :PROMPT].tolist()
    sampling = [SamplingParams(max_tokens=LENGTH, ignore_eos=True)] * len(prompts)
    return generate_tokens(Qwen3(CONFIG, tree, loaded), prompts, sampling, make_policy(stride, layout))


def check_decoding(params: Flat, adapter: AdapterConfig | None, stride: int, layout: str) -> None:
    answers = decoded(params, adapter, stride, layout)
    for answer, tokens in zip(answers, np.asarray(memorised().tokens), strict=True):
        assert np.array_equal(answer.tokens, tokens[PROMPT:])
    each = [stats_from_history(answer.history, LENGTH, stride) for answer in answers]
    assert sum(one.tokens for one in each) / sum(one.forwards for one in each) > 0.95 * stride


def test_fifty_steps_make_drafts_of_memorised_text_acceptable() -> None:
    sampled, greedy = acceptance_of(full_model(), None)
    assert min(*sampled.by_depth, *greedy.by_depth) > 0.95
    for stride, layout in itertools.product((2, 3, 4), LAYOUTS):
        assert sampled.tokens_per_forward(stride, layout) > 0.95 * stride


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_memorised_text_is_decoded_in_a_forward_for_every_stride_of_tokens(stride: int, layout: str) -> None:
    check_decoding(full_model(), None, stride, layout)


def test_a_gated_adapter_drafts_what_its_base_knows_by_heart() -> None:
    _, greedy = acceptance_of(gated_model(), LORA)
    assert min(greedy.by_depth) > 0.95
    check_decoding(gated_model(), LORA, 4, "branch")
