"""Row losses and gradients against PyTorch and against whole logits, and what a pass over the rows may hold and do."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import reference, xla
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, map_rows
from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES, SOFT_LOSSES
from tests.training.support import KEY, close, compiled, golden


class Inputs(NamedTuple):
    """Of a call, besides the name of the loss."""

    hidden: Any
    head: Any
    targets: Any
    weights: Any
    teacher: Any


def inputs(loss: str, batch: int = 2, rows: int = 10, width: int = 8, vocab: int = 20, sets: int = 1) -> Inputs:
    """Random rows, targets at both ends of the vocabulary among them, and weights of which some are zero."""
    keys = jax.random.split(KEY, 5)
    hidden, teacher = (jax.random.normal(key, (batch, rows, width)) for key in keys[:2])
    targets = jax.random.randint(keys[3], (batch, rows), 0, vocab).at[0, 0].set(0).at[-1, -1].set(vocab - 1)
    weights = jax.random.normal(keys[4], (sets, batch, rows)).at[:, 0, 1].set(0)
    head = jax.random.normal(keys[2], (vocab, width))
    return Inputs(hidden, head, targets, weights, teacher if loss in SOFT_LOSSES else None)


def outcome(function: Any, loss: str, given: Inputs, cotangent: jax.Array) -> list[jax.Array]:
    """Sums, row losses, and the gradients of the sums for hidden rows and head, both trained."""

    def sums(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return function(loss, hidden, head, *given[2:])

    @compiled
    def run(hidden: jax.Array, head: jax.Array) -> Any:
        values, pull_back, losses = jax.vjp(sums, hidden, head, has_aux=True)
        return values, losses, *pull_back(cotangent)

    return list(run(given.hidden, given.head))


def scratch_of(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int, loss: str) -> None:
    """Make room for the logits of so many rows, and in float32 for the gradients of twice as many, or four times."""
    monkeypatch.setattr(xla, "SCRATCH_BYTES", 3 * rows * (8 if loss in SOFT_LOSSES else 4) * vocab)


def soft_loss(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Golden rows with the identity as head; their values and the gradient of their mean."""
    p, q = (jnp.asarray(golden("soft")[key])[None] for key in ("p_logits", "q_logits"))
    head, tokens = jnp.eye(q.shape[-1]), jnp.asarray(golden("soft")["tokens"])[None]
    mean = jnp.full((1, *tokens.shape), 1 / tokens.size)
    _, rows, gradient, _ = outcome(linear_cross_entropy, name, Inputs(q, head, tokens, mean, p), jnp.ones(1))
    return np.asarray(rows[0]), np.asarray(gradient[0])


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_soft_losses_and_their_gradients_are_those_of_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch_of(monkeypatch, 7, golden("soft")["q_logits"].shape[-1], name)
    rows, gradient = soft_loss(name)
    assert close(rows, golden("soft")[name])
    assert close(gradient, golden("soft")[f"grad_mean_{name}"], 2e-5)


def test_total_variation_is_one_minus_the_acceptance_of_a_sampled_draft() -> None:
    np.testing.assert_allclose(1 - soft_loss("tv")[0], golden("soft")["accept"], atol=1e-6)


def test_cross_entropy_is_minus_the_log_probability_of_the_target() -> None:
    logits, tokens = golden("soft")["q_logits"].astype(np.float64), golden("soft")["tokens"]
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ours = ROW_LOSSES["ce"](jnp.asarray(golden("soft")["q_logits"]), None, jnp.asarray(tokens))
    assert close(ours, -log_q[np.arange(len(tokens)), tokens], 1e-6)


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize(("room", "sets"), [(1, 1), (3, 2), (10**6, 1)], ids=["row-by-row", "ragged", "at-once"])
def test_losses_and_gradients_are_those_of_whole_logits(
    loss: str, room: int, sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(loss, sets=sets)
    scratch_of(monkeypatch, room, 20, loss)
    cotangent = jnp.asarray([-0.7, 3.0])[:sets]
    ours = outcome(linear_cross_entropy, loss, given, cotangent)
    wanted = outcome(reference.linear_cross_entropy, loss, given, cotangent)
    for name, mine, other in zip(("sums", "losses", "d_hidden", "d_head"), ours, wanted, strict=True):
        assert close(mine, other, 2e-6), name


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_logits_of_any_size_keep_the_precision_of_float32(loss: str) -> None:
    """Logits of ±500 and a vocabulary of many near-equal tokens, against the definition in float64."""
    given = inputs(loss, 1, 6, vocab=500)
    scales = jnp.asarray([1e-3, 0.1, 1, 10, 30, 50])[None, :, None]
    teacher = None if given.teacher is None else given.teacher * scales[:, ::-1]
    given = given._replace(hidden=given.hidden * scales, teacher=teacher)
    ours = outcome(linear_cross_entropy, loss, given, jnp.ones(1))
    with jax.enable_x64(True):
        exact = [
            None if x is None else jnp.asarray(x, jnp.float64 if x.dtype == jnp.float32 else x.dtype) for x in given
        ]
        wanted = [np.asarray(x) for x in outcome(reference.linear_cross_entropy, loss, Inputs(*exact), jnp.ones(1))]
    assert wanted[1].dtype == np.float64
    whole = outcome(reference.linear_cross_entropy, loss, given, jnp.ones(1))
    for name, mine, other, exactly in zip(("sums", "losses", "d_hidden", "d_head"), ours, whole, wanted, strict=True):
        scale = np.abs(exactly).max()
        error, usual = (float(np.abs(np.asarray(array) - exactly).max() / scale) for array in (mine, other))
        assert error <= max(5 * usual, 2e-6), name


@pytest.mark.parametrize("loss", SOFT_LOSSES)
def test_a_row_that_equals_its_teacher_has_neither_loss_nor_gradient(loss: str) -> None:
    given = inputs(loss)
    ours = outcome(linear_cross_entropy, loss, given._replace(teacher=given.hidden), jnp.ones(1))
    assert not any(np.asarray(array).any() for array in ours)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_rows_do_not_influence_each_other(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(loss)
    scratch_of(monkeypatch, 3, 20, loss)
    changed = given._replace(hidden=given.hidden.at[1].multiply(-7).at[0, 1].set(1e4))
    before, after = (outcome(linear_cross_entropy, loss, each, jnp.ones(1)) for each in (given, changed))
    for mine, other in zip(before[1:3], after[1:3], strict=True):
        kept = np.arange(10) != 1
        assert np.array_equal(mine[0][kept], other[0][kept]) and not np.array_equal(mine[1], other[1])


def test_row_losses_carry_no_gradient() -> None:
    given = inputs("ce")
    losses = compiled(jax.grad(lambda hidden: jnp.sum(linear_cross_entropy("ce", hidden, *given[1:])[1])))
    assert not np.asarray(losses(given.hidden)).any()


def test_the_value_alone_is_that_of_the_value_with_its_gradient() -> None:
    given = inputs("tv")
    sums, losses = compiled(partial(linear_cross_entropy, "tv"))(*given)
    with_gradient = outcome(linear_cross_entropy, "tv", given, jnp.ones(1))
    assert np.array_equal(sums, with_gradient[0]) and np.array_equal(losses, with_gradient[1])


def test_a_float32_head_sums_the_gradient_of_bfloat16_rows_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 rows that each add 1/256 of their sum: a bfloat16 sum over chunks would stop growing on the way."""
    scratch_of(monkeypatch, 8, 4, "ce")
    hidden, head = jnp.ones((1, 2048, 2), jnp.bfloat16), jnp.zeros((4, 2))
    given = Inputs(hidden, head, jnp.zeros((1, 2048), jnp.int32), jnp.ones((1, 1, 2048)), None)
    _, _, d_hidden, d_head = outcome(linear_cross_entropy, "ce", given, jnp.ones(1))
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
    np.testing.assert_allclose(d_head, np.repeat([[-1536.0], [512.0], [512.0], [512.0]], 2, axis=1))


def test_a_mean_over_rows_costs_bfloat16_no_precision() -> None:
    """Weights of 1/3 would round each row; the same rows summed, and then divided, do not."""
    given = inputs("ce", vocab=50)._replace(weights=jnp.ones((1, 2, 10)))
    given = given._replace(hidden=given.hidden.astype(jnp.bfloat16))
    sums = outcome(linear_cross_entropy, "ce", given, jnp.ones(1))
    means = outcome(linear_cross_entropy, "ce", given._replace(weights=given.weights / 3), jnp.full(1, 3.0))
    assert np.array_equal(sums[3], means[3])


# What is computed and held.


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, however deep."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            yield from equations_of(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize(
    ("trained", "products"), [((), 1), ((0,), 2), ((0, 1), 3)], ids=["value", "frozen-head", "trained-head"]
)
def test_logits_are_computed_once_and_a_frozen_head_gets_no_gradient(trained: tuple[int, ...], products: int) -> None:
    given = inputs("tv", vocab=33)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return linear_cross_entropy("tv", hidden, head, *given[2:])[0][0]

    run = jax.value_and_grad(loss, trained) if trained else loss
    program = jax.make_jaxpr(run)(given.hidden, given.head)
    assert sum(equation.primitive.name == "dot_general" for equation in equations_of(program.jaxpr)) == products


@pytest.mark.parametrize("vocab", [20, 49_152, 151_936, 300_007])
@pytest.mark.parametrize("count", [1, 63, 2048, 10_000, 16_384, 100_003])
def test_rows_are_cut_into_full_chunks_that_fit(vocab: int, count: int) -> None:
    for arrays, itemsize in itertools.product((1, 2), (2, 4)):
        chunks, parts, rows = xla.chunk_sizes(count, vocab, arrays, itemsize)
        assert (4 * arrays + itemsize * parts) * rows * vocab <= xla.SCRATCH_BYTES
        assert count <= chunks * parts * rows < count + 64 * chunks * parts
        # No chunk more than there must be: each one reads and writes the gradient of the head.
        assert chunks == 1 or (chunks - 1) * parts * rows < count


@pytest.mark.aot
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="the CUDA plug-in is not installed")
def test_h100_programs_read_the_logits_no_more_than_needed_and_keep_within_their_memory() -> None:
    run_script("linear_cross_entropy_aot")


# Rows mapped for measurements.


@pytest.mark.parametrize("room", [1, 3, 10**6])
def test_mapped_rows_are_those_of_whole_logits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch_of(monkeypatch, room, 20, "kl")
    hidden, head, targets, _, teacher = inputs("kl")

    def both(logits: jax.Array, teacher: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        return {"kl": ROW_LOSSES["kl"](logits, teacher, targets), "same": logits.argmax(-1) == teacher.argmax(-1)}

    ours = compiled(partial(map_rows, both))(hidden, head, targets, teacher)
    wanted = both(hidden @ head.T, teacher @ head.T, targets)
    assert close(ours["kl"], wanted["kl"], 2e-6) and np.array_equal(ours["same"], wanted["same"])


# Errors and meshes.


def test_a_call_that_makes_no_sense_is_refused() -> None:
    given = inputs("kl")
    with pytest.raises(ValueError, match="unknown loss 'mse'"):
        linear_cross_entropy("mse", *given)
    with pytest.raises(ValueError, match="'ce' takes no teacher"):
        linear_cross_entropy("ce", *given)
    with pytest.raises(ValueError, match="'tv' takes a teacher"):
        linear_cross_entropy("tv", *given[:4])


def test_losses_and_gradients_on_meshes_are_those_of_one_device() -> None:
    errors = run_script("linear_cross_entropy_mesh")
    assert "rematerialization" not in errors  # XLA's word for a layout that it can only reach by copying all


def run_script(name: str) -> str:
    """Run a script of this folder in a process of its own; what it wrote to stderr."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"tests.kernels.{name}"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
