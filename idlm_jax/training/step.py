"""One optimizer step: losses and gradients of a batch, in parts if asked for, and AdamW on float32 weights."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from idlm_jax.training.config import OptimizerSettings, Stage, TrainConfig
from idlm_jax.training.groups import Batch, GroupPolicy
from idlm_jax.training.objective import Losses, Objective, training_loss
from idlm_jax.training.params import Flat, ModelBuilder
from pallas_kernels import dispatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    # Steps done.
    step: Int[Array, ""]
    # Trained weights, float32.
    params: Flat
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """What a step reports; read a step late, so that the host never waits for it."""

    losses: Losses
    gradient_norm: Float[Array, ""]
    # False: loss or gradient is not a number, and the state was left as it was.
    finite: Bool[Array, ""]


def objective_of(config: TrainConfig, stage: Stage) -> Objective:
    """The loss of one stage."""
    aligned = stage.starts == "aligned"
    return Objective(
        mode=config.mode,
        groups=GroupPolicy(stage.block_size, stage.starts, stage.density),
        noisy_loss=stage.noisy_loss,
        clean_weight=None if stage.clean_weight == "auto" else float(stage.clean_weight),
        by_document=aligned if config.by_document is None else config.by_document,
        noisy_targets=config.noisy_targets,
        learn_prompts=config.learn_prompts,
        attention=config.kernels,
    )


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Warm-up to the peak and cosine decay, over the whole run or in every stage anew."""
    spans = [stage.steps for stage in config.stages] if config.schedule_by_stage else [config.steps]
    ends = [sum(spans[: i + 1]) for i in range(len(spans) - 1)]
    return optax.join_schedules([_warmup_cosine(config.optimizer, steps) for steps in spans], ends)


def _warmup_cosine(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    rising = round(settings.warmup * steps)
    peak = settings.learning_rate
    # The first step already moves: it has the share of the peak that one step of warm-up adds.
    start = peak / (rising + 1)
    return optax.warmup_cosine_decay_schedule(start, peak, rising, max(steps, rising + 1), peak * settings.final)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm; vectors are not decayed."""
    settings = config.optimizer
    adamw = optax.adamw(
        learning_rate_schedule(config),
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=_is_matrix,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw) if settings.clip else adamw


def _is_matrix(params: Any) -> Any:
    matrices = ("kernel", "embedding", "a", "b")
    return {name: name.rsplit(".", 1)[-1] in matrices for name in params}


def init_state(params: Flat, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the optimizer's moments lie where their weights lie."""
    return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))


def make_train_step(
    builder: ModelBuilder, objective: Objective, optimizer: optax.GradientTransformation, seed: int
) -> jax.stages.Wrapped:
    """The compiled step of one stage. It takes (state, frozen weights, batch); the state is donated.

    The batch has a leading axis of parts, whose gradients are averaged.
    """
    step = partial(_train_step, builder=builder, objective=objective, optimizer=optimizer, seed=seed)
    options = None
    if dispatch.device().startswith("gpu"):
        options = {
            # Where a kernel's result is kept for the backward pass, XLA would run the kernel twice: once into the array
            # of all layers' results, once for the layer itself.
            "xla_gpu_enable_dynamic_slice_fusion": False,
        }
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def _train_step(
    state: TrainState,
    frozen: Flat,
    batch: Batch,
    *,
    builder: ModelBuilder,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> tuple[TrainState, StepResult]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(params: Flat, part: Batch, key: Array) -> tuple[Array, Losses]:
        everything = {**frozen, **params}
        losses = training_loss(builder.build(everything), part, objective, key, builder.head(everything))
        return losses.total, losses

    def add_part(total: tuple[Losses, Flat] | None, numbered: tuple[Array, Batch]) -> tuple[tuple[Losses, Flat], None]:
        number, part = numbered
        (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, part, jax.random.fold_in(key, number)
        )
        new = (losses, gradient)
        return new if total is None else jax.tree.map(jnp.add, total, new), None

    parts = batch.tokens.shape[0]
    first, _ = add_part(None, (jnp.int32(0), jax.tree.map(lambda array: array[0], batch)))
    rest = (jnp.arange(1, parts), jax.tree.map(lambda array: array[1:], batch))
    (losses, gradient), _ = (first, None) if parts == 1 else jax.lax.scan(add_part, first, rest)
    gradient = jax.tree.map(lambda array: array / parts, gradient)
    losses = _average(losses, parts)

    norm = optax.tree.norm(gradient)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(losses.total) & jnp.isfinite(norm)
    new = TrainState(state.step + 1, params, optimizer_state)  # pyrefly: ignore[bad-argument-type]
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return kept, StepResult(losses, norm, finite)


def _average(losses: Losses, parts: int) -> Losses:
    """Losses are means of means; counts stay sums."""
    means = {name: getattr(losses, name) / parts for name in ("total", "noisy", "clean", "noisy_by_depth")}
    return losses._replace(**means)
