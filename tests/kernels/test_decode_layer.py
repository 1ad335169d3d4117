"""The kernels between the products of a decode layer: interpreted on the CPU or run on a GPU, beside the reference."""

import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_layer import reference
from pallas_kernels.decode_layer.product import Expand, Product
from tests.kernels.interpreted_triton import interpret

HAS_TRITON = bool(find_spec("triton") and find_spec("jax_triton"))
ON_GPU = jax.default_backend() == "gpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported
if HAS_TRITON:
    from pallas_kernels.decode_layer import gpu, triton_kernels

MODES = [
    pytest.param("interpreted", marks=pytest.mark.skipif(ON_GPU or not HAS_TRITON, reason="needs Triton, and no GPU")),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=MODES)
def kernels(request, monkeypatch):
    if request.param == "interpreted":
        interpret(monkeypatch, gpu, triton_kernels)
    return request.param


class Draw:
    """Random arrays, one after the other."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape, dtype=jnp.float32, scale=1.0):
        return jnp.asarray(scale * self.generator.normal(size=shape), dtype)


def make_product(draw, batch, rows, widths, splits=1, bias=False, squares=0, rank=0, first_row=0, dtype=jnp.float32):
    columns = sum(widths)
    of_parts = dtype if splits == 1 else jnp.float32  # as ``multiply`` makes them, of few rows and of many
    expand = None
    if rank:
        expand = Expand(draw(rank, columns, dtype=dtype), 0.5, first_row, widths)
    return Product(
        parts_SBWC=draw(splits, batch, rows, columns + len(widths) * rank, dtype=of_parts),
        bias_N=draw(columns, dtype=dtype) if bias else None,
        squares_BWT=jnp.abs(draw(batch, rows, squares, scale=64)) if squares else None,
        expand=expand,
        columns=columns,
        inputs=squares * 64,
        epsilon=1e-3,
    )


def assert_close(ours, wanted):
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}[got.dtype.name]
        got, want = np.float32(got), np.float32(want)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max() / 10))


# Triton's interpreter rounds bfloat16 wrongly and multiplies its bits.
HALF = jnp.bfloat16 if ON_GPU else jnp.float16
# What a product may bring along (a split sum, a bias, the norm of its input, an adapter on some or all rows); requests
# and window rows (no whole tile of rows, a whole one, requests in two tiles); query and key heads, and head_dim.
PRODUCTS = {
    "plain": (dict(), (1, 3), (4, 2, 64), HALF),
    "split": (dict(splits=4, squares=3), (3, 7), (3, 3, 128), HALF),
    "float32": (dict(splits=2, squares=3), (4, 4), (4, 1, 64), jnp.float32),
    "bias": (dict(splits=2, bias=True, squares=5), (1, 16), (4, 2, 64), HALF),
    "lora": (dict(splits=2, squares=3, rank=16, first_row=2), (3, 7), (4, 1, 64), HALF),
    "lora-float32": (dict(squares=3, rank=16, first_row=4), (3, 7), (4, 2, 128), jnp.float32),
    "lora-all-rows": (dict(bias=True, squares=3, rank=128, first_row=0), (1, 5), (6, 2, 64), HALF),
    "lora-odd-rank": (dict(bias=True, squares=3, rank=24, first_row=3), (4, 4), (4, 2, 64), HALF),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_sum_with_the_residual_equals_the_reference(kernels, name):
    draw, width, (brought, rows, _, dtype) = Draw(1), 200, PRODUCTS[name]
    product = make_product(draw, *rows, (width,), **brought, dtype=dtype)
    arguments = draw(*rows, width, dtype=dtype), product, draw(width, dtype=dtype)
    assert_close(gpu.add(*arguments), jax.jit(reference.add)(*arguments))


@pytest.mark.parametrize("name", PRODUCTS)
def test_gated_unit_equals_the_reference(kernels, name):
    brought, rows, _, dtype = PRODUCTS[name]
    product = make_product(Draw(2), *rows, (136, 136), **brought, dtype=dtype)
    assert_close(gpu.gated(product, dtype), jax.jit(reference.gated, static_argnums=1)(product, dtype))


def rotation(draw, product, heads, head_dim, slots, dtype, qk_norm=True):
    """Arguments of ``rotate_and_store`` after the product, for one pool of all requests; spare slots are NaN."""
    batch, rows = product.parts_SBWC.shape[1:3]
    length = jnp.asarray(draw.generator.integers(0, slots - rows + 1, batch), jnp.int32)
    length = length.at[0].set(slots - rows).at[-1].set(0)
    tables = draw(batch, rows, head_dim // 2), draw(batch, rows, head_dim // 2)
    caches = [jnp.full((batch, heads, slots, head_dim), jnp.nan, dtype) for _ in range(2)]
    scales = (draw(head_dim, dtype=dtype), draw(head_dim, dtype=dtype)) if qk_norm else None
    return scales, tables, *caches, length


@pytest.mark.parametrize("name", PRODUCTS)
def test_rotation_and_storing_equal_the_reference(kernels, name):
    draw, (brought, rows, (query_heads, heads, head_dim), dtype) = Draw(3), PRODUCTS[name]
    widths = (query_heads * head_dim, heads * head_dim, heads * head_dim)
    product = make_product(draw, *rows, widths, **brought, dtype=dtype)
    arguments = product, *rotation(draw, product, heads, head_dim, 24, dtype, qk_norm=name != "bias")
    assert_close(gpu.rotate_and_store(*arguments), jax.jit(reference.rotate_and_store)(*arguments))
