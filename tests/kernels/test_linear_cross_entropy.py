"""Row losses against PyTorch, and rows in chunks against all rows at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy.reference import ROW_LOSSES, SOFT_LOSSES, map_rows
from tests.training.support import KEY, close, compiled, golden


def soft_loss(name: str, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Golden rows through ``map_rows`` with the identity as head; their values and the gradient of their mean."""
    p, q = (jnp.asarray(golden("soft")[key])[None] for key in ("p_logits", "q_logits"))
    head, tokens = jnp.eye(q.shape[-1]), jnp.asarray(golden("soft")["tokens"])[None]

    def mean(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = map_rows(ROW_LOSSES[name], q, head, tokens, p, chunk)
        return jnp.mean(rows), rows

    gradient, rows = compiled(jax.grad(mean, has_aux=True))(q)
    return np.asarray(rows[0]), np.asarray(gradient[0])


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_soft_losses_and_their_gradients_are_those_of_pytorch(name: str) -> None:
    rows, gradient = soft_loss(name, chunk=7)
    assert close(rows, golden("soft")[name])
    assert close(gradient, golden("soft")[f"grad_mean_{name}"], 2e-5)


def test_total_variation_is_one_minus_the_acceptance_of_a_sampled_draft() -> None:
    np.testing.assert_allclose(1 - soft_loss("tv", chunk=40)[0], golden("soft")["accept"], atol=1e-6)


def test_cross_entropy_is_minus_the_log_probability_of_the_target() -> None:
    logits, tokens = golden("soft")["q_logits"].astype(np.float64), golden("soft")["tokens"]
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ours = ROW_LOSSES["ce"](jnp.asarray(golden("soft")["q_logits"]), None, jnp.asarray(tokens))
    assert close(ours, -log_q[np.arange(len(tokens)), tokens], 1e-6)


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_values_and_gradients_are_the_same_for_every_chunk(name: str) -> None:
    keys = jax.random.split(KEY, 4)
    hidden, teacher = (jax.random.normal(key, (2, 10, 8)) for key in keys[:2])
    head, targets = jax.random.normal(keys[2], (20, 8)), jax.random.randint(keys[3], (2, 10), 0, 20)
    weights = jnp.linspace(0.1, 1.0, 20).reshape(2, 10)
    soft = teacher if name in SOFT_LOSSES else None

    def at_once(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = None if soft is None else jax.lax.stop_gradient(soft @ head.T)
        rows = ROW_LOSSES[name](hidden @ head.T, p, targets)
        return jnp.sum(weights * rows), rows

    def in_chunks(hidden: jax.Array, head: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
        rows = map_rows(ROW_LOSSES[name], hidden, head, targets, soft, chunk)
        return jnp.sum(weights * rows), rows

    wanted = jax.tree.leaves(compiled(jax.grad(at_once, (0, 1), has_aux=True))(hidden, head))
    for chunk in (1, 3, 5, 10, 256):
        run = compiled(jax.grad(partial(in_chunks, chunk=chunk), (0, 1), has_aux=True))
        for ours, reference in zip(jax.tree.leaves(run(hidden, head)), wanted, strict=True):
            assert close(ours, reference, 2e-6), chunk


def test_a_float32_head_sums_the_gradient_of_bfloat16_rows_in_float32() -> None:
    """2,048 rows that each add 1/256 of their sum: a bfloat16 sum over chunks would stop growing on the way."""
    hidden, head = jnp.ones((1, 2048, 2), jnp.bfloat16), jnp.zeros((4, 2))
    targets = jnp.zeros((1, 2048), jnp.int32)
    run = compiled(jax.grad(lambda head: jnp.sum(map_rows(ROW_LOSSES["ce"], hidden, head, targets, None, 8))))
    gradient = run(head)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, np.repeat([[-1536.0], [512.0], [512.0], [512.0]], 2, axis=1))
