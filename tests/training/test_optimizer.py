"""AdamW, its schedule, and whole training steps against the same written out in numpy."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.config import ModelConfig
from idlm_jax.training.config import OptimizerSettings, Stage, TrainConfig
from idlm_jax.training.groups import Batch
from idlm_jax.training.objective import training_loss
from idlm_jax.training.params import Flat, ModelBuilder
from idlm_jax.training.step import init_state, learning_rate_schedule, make_optimizer, make_train_step, objective_of
from tests.decoding.support import tiny_adapter, tiny_config
from tests.training.support import KEY, compiled, random_batch, tiny_builder, tiny_params

SETTINGS = OptimizerSettings(
    learning_rate=0.01, warmup=0.5, final=0.1, beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.3, clip=1.0
)


def config_of(settings: OptimizerSettings = SETTINGS, stages: tuple[int, ...] = (4,), **changes: Any) -> TrainConfig:
    return TrainConfig("", "", "", optimizer=settings, stages=tuple(Stage(steps) for steps in stages), **changes)


def rates(config: TrainConfig) -> list[float]:
    """The learning rate of every step, and what would come after the last."""
    schedule = learning_rate_schedule(config)
    return [float(schedule(step)) for step in range(config.steps + 1)]


def naive_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear to the peak, of which the first step already has a share; then half a cosine down to ``final``."""
    rising = round(settings.warmup * steps)
    if step < rising:
        return settings.learning_rate * (1 + step * rising / rising) / (rising + 1)
    falling = 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
    return settings.learning_rate * (settings.final + (1 - settings.final) * falling)


class NaiveAdamW:
    """One weight after another, float64 (Loshchilov & Hutter, algorithm 2)."""

    def __init__(self, settings: OptimizerSettings, steps: int, decayed: set[str]):
        self.settings, self.steps, self.decayed = settings, steps, decayed
        self.step, self.m, self.v = 0, {}, {}

    def update(self, params: Mapping[str, Any], gradient: Mapping[str, Any]) -> dict[str, np.ndarray]:
        s = self.settings
        gradient = {name: np.asarray(g, np.float64) for name, g in gradient.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrink = min(1.0, s.clip / norm) if s.clip else 1.0
        rate = naive_rate(s, self.step, self.steps)
        self.step += 1
        after = {}
        for name, g in gradient.items():
            w, g = np.asarray(params[name], np.float64), g * shrink
            self.m[name] = s.beta1 * self.m.get(name, 0) + (1 - s.beta1) * g
            self.v[name] = s.beta2 * self.v.get(name, 0) + (1 - s.beta2) * g**2
            m, v = self.m[name] / (1 - s.beta1**self.step), self.v[name] / (1 - s.beta2**self.step)
            decay = s.weight_decay * w if name in self.decayed else 0
            after[name] = w - rate * (m / (np.sqrt(v) + s.epsilon) + decay)
        return after


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_updates_are_those_of_adamw_with_clipping_and_decay_of_matrices(clip: float) -> None:
    settings = replace(SETTINGS, clip=clip)
    keys = jax.random.split(KEY, 8)
    params = {
        "layers.mlp.up_proj.kernel": jax.random.normal(keys[0], (2, 3, 4)),
        "layers.q_norm.scale": jax.random.normal(keys[1], (2, 4)),
    }
    optimizer = make_optimizer(config_of(settings))
    state, naive = optimizer.init(params), NaiveAdamW(settings, 4, {"layers.mlp.up_proj.kernel"})
    update = compiled(optimizer.update)
    wanted: Mapping[str, Any] = params
    # Norms above and below the limit.
    for i, scale in enumerate([3.0, 0.01, 0.3, 1.0]):
        gradient = {name: scale * jax.random.normal(keys[2 + i], w.shape) for name, w in params.items()}
        updates, state = update(gradient, state, params)
        params = {name: w + updates[name] for name, w in params.items()}
        wanted = naive.update(wanted, gradient)
        for name, array in params.items():
            np.testing.assert_allclose(array, wanted[name], rtol=2e-5, atol=1e-6, err_msg=f"{name}, step {i}")


def test_steps_are_adamw_on_the_mean_gradient_of_their_parts() -> None:
    """Three steps of two parts: losses, norms and weights."""
    vocab, steps = 12, 4
    # A large epsilon keeps Adam from magnifying the rounding of gradients that are almost zero.
    config = config_of(replace(SETTINGS, epsilon=1e-3, clip=0.05), mode="ar", dtype="float32")
    builder, params = tiny_builder(vocab_size=vocab), tiny_params(vocab_size=vocab)
    objective = objective_of(config, config.stages[0])
    parts = jax.tree.map(lambda array: array.reshape(2, 2, -1), random_batch(4, 20, vocab - 1))

    @compiled
    def gradient_of(params: Flat, part: Any) -> tuple[jax.Array, Flat]:
        def loss(params: Flat) -> jax.Array:
            return training_loss(builder.build(params), part, objective, KEY, builder.head(params)).total

        return jax.value_and_grad(loss)(params)

    optimizer = make_optimizer(config)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    step = make_train_step(builder, objective, optimizer, 0).lower(state, {}, parts)
    step = step.compile({"xla_backend_optimization_level": 0})
    naive = NaiveAdamW(config.optimizer, steps, {name for name in params if not name.endswith("scale")})
    wanted: Mapping[str, Any] = params
    for i in range(3):
        each = [
            gradient_of(jax.tree.map(jnp.float32, wanted), jax.tree.map(lambda array, p=p: array[p], parts))
            for p in range(2)
        ]
        gradient = {name: (np.asarray(each[0][1][name]) + np.asarray(each[1][1][name])) / 2 for name in params}
        state, result = step(state, {}, parts)
        wanted = naive.update(wanted, gradient)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        # Reported before clipping, which has something to do.
        assert float(result.gradient_norm) == pytest.approx(norm, rel=1e-4) and norm > 0.05
        assert float(result.losses.total) == pytest.approx((float(each[0][0]) + float(each[1][0])) / 2, rel=1e-5)
        assert int(state.step) == i + 1 and bool(result.finite)
        for name, array in state.params.items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-5, err_msg=f"{name}, step {i}")


def test_only_matrices_decay() -> None:
    """With no gradient a step is the decay alone; biases, norms and the mask embedding have none."""
    config: ModelConfig = tiny_config(attention_bias=True)
    builder = ModelBuilder(config, tiny_adapter(config).config, "float32")
    params = {name: np.ones(shape, np.float32) for name, shape in builder.shapes().items()}
    optimizer = make_optimizer(config_of(replace(SETTINGS, warmup=0.0)))
    run = compiled(lambda gradient: optimizer.update(gradient, optimizer.init(params), params)[0])
    updates = run(jax.tree.map(np.zeros_like, params))
    still = {name for name, update in updates.items() if not np.asarray(update).any()}
    assert still == {name for name in params if name.endswith(("scale", "bias", "mask_embedding"))}
    assert any(name.endswith("bias") for name in still) and "adapter.mask_embedding" in still
    for name in params.keys() - still:
        np.testing.assert_allclose(updates[name], -SETTINGS.learning_rate * SETTINGS.weight_decay, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
def test_the_rate_rises_to_its_peak_and_falls_by_a_cosine(warmup: float) -> None:
    settings = replace(SETTINGS, warmup=warmup)
    found = rates(config_of(settings, (40,)))
    np.testing.assert_allclose(found, [naive_rate(settings, step, 40) for step in range(41)], rtol=1e-5)
    peak = round(warmup * 40)
    assert found[0] > 0 and found[peak] == max(found) == pytest.approx(settings.learning_rate)
    assert found[-1] == pytest.approx(settings.learning_rate * settings.final)
    assert all(later < earlier for earlier, later in zip(found[peak:], found[peak + 1 :], strict=False))


def test_a_rate_that_only_rises_reaches_its_peak_after_the_last_step() -> None:
    found = rates(config_of(replace(SETTINGS, warmup=1.0), (10,)))
    np.testing.assert_allclose(found, SETTINGS.learning_rate * np.arange(1, 12) / 11, rtol=1e-5)


def test_the_schedule_spans_all_stages_or_begins_anew_in_each() -> None:
    stages = (10, 20, 6)
    whole = rates(config_of(stages=stages))
    np.testing.assert_allclose(whole, rates(config_of(stages=(36,))))
    each = rates(config_of(stages=stages, schedule_by_stage=True))
    np.testing.assert_allclose(each[:-1], [rate for steps in stages for rate in rates(config_of(stages=(steps,)))[:-1]])


def test_every_step_and_part_draws_groups_of_its_own_and_the_same_ones_again() -> None:
    config = config_of(mode="gated-lora", dtype="float32")
    # Two groups a row, far fewer than there are places for.
    stage = replace(config.stages[0], block_size=4, density=0.3)
    builder, params = tiny_builder(True, 12), tiny_params(True, 12)
    trained = {name: array for name, array in params.items() if name.startswith("adapter.")}
    frozen = {name: array for name, array in params.items() if name not in trained}
    part = random_batch(2, 20, 11)
    twice = jax.tree.map(lambda array: jnp.stack([array, array]), part)
    once = replace(twice, loss_mask=twice.loss_mask.at[1].set(False))
    optimizer = make_optimizer(config)
    start = init_state(trained, optimizer)
    lowered = make_train_step(builder, objective_of(config, stage), optimizer, 0).lower(start, frozen, twice)
    step = lowered.compile({"xla_backend_optimization_level": 0})

    def loss_at(number: int, parts: Batch) -> float:
        state = replace(jax.tree.map(jnp.copy, start), step=jnp.int32(number))
        return float(step(state, frozen, parts)[1].losses.noisy)

    assert loss_at(0, twice) == loss_at(0, twice)
    assert len({loss_at(number, once) for number in range(4)}) == 4
    # The second part is the first again, but not its groups.
    assert loss_at(0, twice) != pytest.approx(2 * loss_at(0, once), rel=1e-3)
