"""Building blocks of a layer against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.backbone.layers import apply_rope, rope_tables
from idlm_jax.config import RopeConfig


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The halves of ``x`` as the parts of complex numbers, turned by ``angles``."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_the_rotary_embedding_turns_pairs_of_halves_and_its_gradient_turns_them_back() -> None:
    rng = np.random.default_rng(0)
    head_dim, positions = 16, np.array([[0, 1, 7, 4095], [3, 2, 2, 100]])
    x, cotangent = rng.standard_normal((2, 2, 4, 3, head_dim)).astype(np.float32)
    tables = rope_tables(RopeConfig(theta=1e4), head_dim, jnp.asarray(positions))
    out, pull_back = jax.vjp(lambda x: apply_rope(x, tables), jnp.asarray(x))
    angles = positions[:, :, None, None] / 1e4 ** (np.arange(0, head_dim, 2) / head_dim)
    # Angles of thousands of turns are rounded in float32.
    np.testing.assert_allclose(out, rotated(x, angles), atol=2e-3)
    np.testing.assert_allclose(pull_back(jnp.asarray(cotangent))[0], rotated(cotangent, -angles), atol=2e-3)
