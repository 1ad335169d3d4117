"""The loss of a step against sums written out in numpy, and what its program may hold and differentiate."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.training.groups import Batch, GroupPolicy, draw_groups
from idlm_jax.training.objective import Losses, Objective, training_loss
from idlm_jax.training.params import Flat, ModelBuilder
from idlm_jax.training.two_stream import clean_stream
from tests.training.support import (
    KEY,
    batch_of,
    close,
    compiled,
    random_batch,
    streams,
    tiny_builder,
    tiny_params,
    two_streams,
)

VOCAB, BLOCK = 12, 3
MASK = VOCAB - 1
RANDOM = GroupPolicy(BLOCK, "random")
ALIGNED = GroupPolicy(BLOCK, "aligned", density=2.0)


def turns() -> Batch:
    """Two rows of three documents and padding; one of two turns, one without an answer."""
    rows = [["0011110011100", "011111", "000", "00"], ["1111111", "00001", "000111111", "000"]]
    learnt = np.array([[digit == "1" for digit in "".join(row)] for row in rows])
    segments = np.array([np.repeat([1, 2, 3, 0], [len(document) for document in row]) for row in rows])
    tokens = np.random.default_rng(1).integers(0, MASK, (2, 24))
    return batch_of(tokens, learnt, segments)


@partial(compiled, static_argnums=(0, 3))
def loss_of(builder: ModelBuilder, params: Flat, batch: Batch, objective: Objective, key: jax.Array) -> Losses:
    return training_loss(builder.build(params), batch, objective, key, builder.head(params))


def losses(batch: Batch, objective: Objective, key: jax.Array = KEY) -> Losses:
    """Of the tiny model, with an adapter in the modes that have one."""
    adapter = objective.mode.endswith("lora")
    return loss_of(tiny_builder(adapter, VOCAB), tiny_params(adapter, VOCAB), batch, objective, key)


def arrays_of(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of everything a program computes, however deep."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            yield from arrays_of(inner) if hasattr(inner, "eqns") else ()


def largest_array(function: Callable[[Flat], jax.Array], builder: ModelBuilder) -> int:
    """Elements of the largest array of the gradient of a function of the model's weights."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in builder.shapes().items()}
    return max(int(np.prod(shape)) for shape in arrays_of(jax.make_jaxpr(jax.grad(function))(shapes).jaxpr))


@pytest.mark.parametrize("noisy_loss", ["ce", "tv"])
def test_no_array_of_all_rows_and_the_vocabulary_is_ever_made(noisy_loss: str) -> None:
    """Traced alone, at the vocabulary of Qwen3."""
    vocab, length = 151_936, 2048
    builder, batch = tiny_builder(vocab_size=vocab), random_batch(4, length, vocab)
    objective = Objective("full", RANDOM, noisy_loss)
    of_rows = 4 * length * vocab

    def loss(params: Flat) -> jax.Array:
        return training_loss(builder.build(params), batch, objective, KEY, builder.head(params)).total

    def logits(params: Flat) -> jax.Array:
        return jnp.sum(builder.build(params).logits(jnp.ones((4, length, builder.config.hidden_size))))

    assert largest_array(loss, builder) < of_rows / 4
    # The measure sees such an array where there is one.
    assert largest_array(logits, builder) >= of_rows


# Weights of the rows, by hand.


def naive_losses(batch: Batch, objective: Objective, key: jax.Array) -> dict[str, float]:
    """Noisy and clean cross-entropy from logits, one token after another."""
    builder, params = tiny_builder(vocab_size=VOCAB), tiny_params(vocab_size=VOCAB)
    noisy_rows = draw_groups(batch, objective.groups, MASK, key)
    logits = [
        np.asarray(x, np.float64) for x in streams(builder, params, batch, noisy_rows, objective.groups.block_size)
    ]
    clean_log, noisy_log = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in logits)
    tokens, learnt, segments = (np.asarray(a) for a in (batch.tokens, batch.loss_mask, batch.segment_ids))
    documents: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row, i in np.ndindex(*tokens.shape):
        if segments[row, i]:
            one = documents.setdefault((row, segments[row, i]), {"noisy": [], "clean": [], "learnt": []})
            one["learnt"] += [1.0] * int(learnt[row, i])
            if i + 1 < tokens.shape[1] and segments[row, i + 1] == segments[row, i] and learnt[row, i + 1]:
                one["clean"].append(-clean_log[row, i, tokens[row, i + 1]])
                if objective.noisy_targets == "answer" and not learnt[row, i]:
                    one["noisy"].append(one["clean"][-1])
    for row, r in zip(*np.nonzero(np.asarray(noisy_rows.is_target)), strict=True):
        i = int(noisy_rows.clean_row[row, r])
        documents[row, segments[row, i]]["noisy"].append(-noisy_log[row, r, tokens[row, i + 1]])
    with_loss = [one for one in documents.values() if one["clean"]]
    assert len(with_loss) < len(documents)
    if objective.by_document:
        noisy = [sum(one["noisy"]) / len(one["learnt"]) for one in with_loss]
        clean = [sum(one["clean"]) / len(one["clean"]) for one in with_loss]
    else:
        noisy, clean = ([value for one in with_loss for value in one[kind]] for kind in ("noisy", "clean"))
    return {"noisy": float(np.mean(noisy)), "clean": float(np.mean(clean))}


@pytest.mark.parametrize(
    "objective",
    [
        Objective("full", ALIGNED, by_document=True),
        Objective("full", ALIGNED, by_document=True, noisy_targets="answer"),
        Objective("full", ALIGNED),
        Objective("full", RANDOM, noisy_targets="answer", clean_weight=0.7),
        Objective("full", RANDOM, clean_weight=None),
    ],
    ids=["by-document", "by-document-answer", "by-row", "random-answer", "random-auto"],
)
def test_losses_are_the_sums_written_out(objective: Objective) -> None:
    batch = turns()
    ours, wanted = losses(batch, objective), naive_losses(batch, objective, KEY)
    assert float(ours.noisy) == pytest.approx(wanted["noisy"], rel=2e-6)
    assert float(ours.clean) == pytest.approx(wanted["clean"], rel=2e-6)
    weight = wanted["noisy"] / wanted["clean"] if objective.clean_weight is None else objective.clean_weight
    assert float(ours.total) == pytest.approx(wanted["noisy"] + weight * wanted["clean"], rel=2e-6)
    assert ours.clean_rows == np.asarray(batch.clean_targets).sum()
    assert ours.noisy_rows == np.asarray(draw_groups(batch, objective.groups, MASK, KEY).is_target).sum()


def test_loss_by_depth_averages_to_the_noisy_loss() -> None:
    ours = losses(turns(), Objective("full", RANDOM))
    is_target = np.asarray(draw_groups(turns(), RANDOM, MASK, KEY).is_target)
    rows = is_target.reshape(-1, BLOCK).sum(axis=0)
    assert rows[0] > rows[-1] > 0 and len(set(np.asarray(ours.noisy_by_depth))) == BLOCK
    assert float(ours.noisy) == pytest.approx(float(rows @ ours.noisy_by_depth / rows.sum()), rel=1e-6)


def test_learning_prompts_is_a_loss_mask_of_every_token() -> None:
    everything = replace(turns(), loss_mask=turns().segment_ids > 0)
    ours = losses(turns(), Objective("full", RANDOM, learn_prompts=True))
    wanted = losses(everything, Objective("full", RANDOM))
    assert float(ours.total) == float(wanted.total) != float(losses(turns(), Objective("full", RANDOM)).total)


def test_plain_fine_tuning_is_the_clean_loss_alone() -> None:
    ours, both = losses(turns(), Objective("ar", RANDOM)), losses(turns(), Objective("full", RANDOM))
    assert float(ours.total) == float(ours.clean) == pytest.approx(float(both.clean), rel=1e-6)
    assert ours.noisy == ours.noisy_rows == 0 and ours.clean_rows == both.clean_rows


@pytest.mark.parametrize("mode", ["full", "gated-lora"])
def test_tokens_that_nothing_learnt_depends_on_change_no_loss(mode: str) -> None:
    """Padding, documents without a target, and what follows the last answer of a document."""
    batch = turns()
    objective = Objective(mode, ALIGNED, "ce" if mode == "full" else "tv", by_document=True)
    tokens, segments, learnt = (np.asarray(a) for a in (batch.tokens, batch.segment_ids, batch.loss_mask))
    idle = np.array(
        [
            [segments[r, i] == 0 or not learnt[r, i:][segments[r, i:] == segments[r, i]].any() for i in range(24)]
            for r in range(2)
        ]
    )
    assert idle.sum() >= 10 and (idle & (segments > 0)).any()
    before = losses(batch, objective)
    after = losses(replace(batch, tokens=jnp.asarray(np.where(idle, (tokens + 1) % MASK, tokens))), objective)
    assert float(before.total) == float(after.total)
    # The last prompt token of a document that is learnt from does.
    prompt = ~idle & ~learnt
    changed = losses(replace(batch, tokens=jnp.asarray(np.where(prompt, (tokens + 1) % MASK, tokens))), objective)
    assert float(changed.total) != pytest.approx(float(before.total), rel=1e-3)


# Gradients.


@cache
def gradients(objective: Objective) -> tuple[Losses, dict[str, Flat]]:
    """Losses, and the gradients of total, noisy and clean loss with respect to all trained weights."""
    builder, everything = tiny_builder(vocab_size=VOCAB), tiny_params(vocab_size=VOCAB)

    def loss(params: Flat) -> tuple[tuple[jax.Array, ...], Losses]:
        parts = training_loss(builder.build(params), turns(), objective, KEY, builder.head(params))
        return (parts.total, parts.noisy, parts.clean), parts

    @compiled
    def run(params: Flat) -> tuple[Losses, Flat]:
        _, pull_back, parts = jax.vjp(loss, params, has_aux=True)
        return parts, jax.vmap(pull_back)(tuple(jnp.eye(3)))[0]

    parts, stacked = run(everything)
    names = ("total", "noisy", "clean")
    return parts, {name: {key: a[i] for key, a in stacked.items()} for i, name in enumerate(names)}


def test_no_gradient_flows_through_the_ratio_of_auto_balance() -> None:
    parts, gradient = gradients(Objective("full", RANDOM, clean_weight=None))
    ratio = float(parts.noisy) / float(parts.clean)
    assert float(parts.total) == pytest.approx(2 * float(parts.noisy), rel=1e-5)
    for name, total in gradient["total"].items():
        assert close(total, gradient["noisy"][name] + ratio * gradient["clean"][name], 1e-5), name


def test_the_teacher_of_a_soft_loss_gets_no_gradient() -> None:
    """KL(p ‖ q) with p a constant: gradient of the cross-entropy of q against the p of the weights as they are."""
    builder, everything = tiny_builder(vocab_size=VOCAB), tiny_params(vocab_size=VOCAB)
    batch = turns()
    rows = draw_groups(batch, RANDOM, MASK, KEY)
    _, gradient = gradients(Objective("full", RANDOM, "kl"))
    clean_logits, _ = streams(builder, everything, batch, rows, BLOCK)
    p = jax.nn.softmax(jnp.take_along_axis(clean_logits, rows.clean_row[:, :, None], axis=1))

    def cross_entropy(params: Flat) -> jax.Array:
        _, noisy_logits = two_streams(builder, params, batch, rows, BLOCK)
        by_row = -jnp.sum(p * jax.nn.log_softmax(noisy_logits), axis=-1)
        return jnp.sum(by_row * rows.is_target) / jnp.sum(rows.is_target)

    wanted = compiled(jax.grad(cross_entropy))(everything)
    for name, ours in gradient["noisy"].items():
        assert close(ours, wanted[name], 2e-5), name


def adapter_residuals(mode: str, noisy_loss: str) -> set[tuple[int, ...]]:
    """Shapes of what the backward pass of an adapter's loss keeps."""
    builder, params = tiny_builder(True, VOCAB), tiny_params(True, VOCAB)
    base = {name: array for name, array in params.items() if not name.startswith("adapter.")}
    trained = {name: array for name, array in params.items() if name.startswith("adapter.")}

    def loss(trained: Flat) -> jax.Array:
        everything = {**base, **trained}
        objective = Objective(mode, GroupPolicy(4, density=0.5), noisy_loss)
        return training_loss(builder.build(everything), turns(), objective, KEY, builder.head(base)).total

    _, pull_back = jax.eval_shape(lambda trained: jax.vjp(loss, trained), trained)
    return {residual.shape for residual in jax.tree.leaves(pull_back)}


def test_a_gated_adapter_keeps_nothing_of_the_clean_stream_but_keys_and_values() -> None:
    config = tiny_builder(True, VOCAB).config
    keys = (config.num_hidden_layers, 2, 24, config.num_key_value_heads, config.head_dim)
    of_rows = (config.num_hidden_layers, 2, 24, config.hidden_size)
    # 16 noisy rows: an axis of 24 is the clean stream's. Without remat whole layers would be kept.
    gated = {shape for shape in adapter_residuals("gated-lora", "ce") if 24 in shape[:-1] and len(shape) > 2}
    assert gated == {keys}
    # The official way trains both streams, and so keeps the input of each layer; keys and values are computed again.
    both = adapter_residuals("lora", "ce")
    assert of_rows in both
    assert keys not in both


def test_a_gated_adapter_has_no_effect_on_the_clean_stream() -> None:
    builder, params = tiny_builder(True, VOCAB), tiny_params(True, VOCAB)
    trained = {name: array for name, array in params.items() if name.startswith("adapter.")}

    @partial(compiled, static_argnums=1)
    def effect(trained: Flat, adapter_from: int | None) -> Flat:
        def total(trained: Flat) -> jax.Array:
            model = builder.build({**params, **trained})
            (hidden,), states = model.streams([clean_stream(turns(), adapter_from)], None)
            return sum(jnp.sum(jnp.sin(array)) for array in (hidden, *states))  # type: ignore

        return jax.grad(total)(trained)

    assert not any(np.asarray(array).any() for array in effect(trained, None).values())
    assert all(np.asarray(array).any() for name, array in effect(trained, 0).items() if name.endswith(".b"))
    ours = losses(turns(), Objective("gated-lora", RANDOM, "kl"))
    assert ours.clean == ours.clean_rows == 0 and float(ours.total) == float(ours.noisy) > 0
