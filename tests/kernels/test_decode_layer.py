"""The kernels between the products of a decode layer: interpreted on the CPU or run on a GPU, beside the reference."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.decode_attention.packing import Packing
from pallas_kernels.decode_layer import api, reference
from pallas_kernels.decode_layer.product import Expand, Product
from tests.kernels.interpreted_triton import HAS_TRITON, MODES, ON_GPU, interpret

if HAS_TRITON:
    from pallas_kernels.decode_layer import gpu, triton_kernels


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
    """Within rounding; what is wanted must not be compiled, or XLA leaves out roundings."""
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
    assert_close(gpu.add(*arguments), reference.add(*arguments))


@pytest.mark.parametrize("name", PRODUCTS)
def test_gated_unit_equals_the_reference(kernels, name):
    brought, rows, _, dtype = PRODUCTS[name]
    product = make_product(Draw(2), *rows, (136, 136), **brought, dtype=dtype)
    assert_close(gpu.gated(product, dtype), reference.gated(product, dtype))


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
    assert_close(gpu.rotate_and_store(*arguments), reference.rotate_and_store(*arguments))


def heads_product(draw, batch, rows, query_heads, heads, head_dim, **brought):
    widths = (query_heads * head_dim, heads * head_dim, heads * head_dim)
    return make_product(draw, batch, rows, widths, **brought)


def test_pools_get_the_rows_of_their_requests(kernels):
    draw = Draw(4)
    product = heads_product(draw, 5, 4, 2, 1, 64, splits=2, squares=3, rank=16, first_row=2)
    scales, tables, keys, values, length = rotation(draw, product, 1, 64, 24, jnp.float32)
    for first, requests in ((0, 2), (2, 3)):
        pool = slice(first, first + requests)
        arguments = product, scales, tables, keys[pool], values[pool], length, first
        wanted = reference.rotate_and_store(*arguments)
        assert wanted[0].shape[0] == requests
        assert_close(gpu.rotate_and_store(*arguments), wanted)


# Whole tiles; rows that fill up a tile; several tiles, the last with window rows to spare.
@pytest.mark.parametrize(("rows", "query_heads", "heads"), [(4, 4, 2), (7, 6, 2), (9, 12, 1)])
def test_queries_are_packed_and_rows_that_fill_up_a_tile_are_left_alone(kernels, rows, query_heads, heads):
    draw, pack = Draw(8), Packing(rows, heads, query_heads // heads)
    product = heads_product(draw, 3, rows, query_heads, heads, 64, splits=2, squares=3, rank=16, first_row=2)
    scales, tables, keys, values, length = rotation(draw, product, heads, 64, 24, jnp.float32)
    arguments = product, scales, tables, keys[1:], values[1:], length, 1, pack
    (ours, *caches), (wanted, *wanted_caches) = gpu.rotate_and_store(*arguments), reference.rotate_and_store(*arguments)
    used = np.asarray(pack.packed(jnp.ones((2, rows, query_heads, 64)))) == 1
    assert_close((jnp.where(used, ours, 0), *caches), (wanted, *wanted_caches))
    if kernels == "interpreted":  # outputs begin as NaN
        assert np.isnan(np.asarray(ours)[~used]).all()


# Rows of two requests on one page, rows over two pages and over three; the third request waits, its table all bin.
@pytest.mark.parametrize(("rows", "packed"), [(5, False), (7, True), (19, True)])
def test_rows_go_to_the_pages_of_their_requests_and_nothing_else_changes(kernels, rows, packed):
    draw, page, heads = Draw(9), 8, 2
    product = heads_product(draw, 4, rows, 4, heads, 64, splits=2, squares=3, rank=16, first_row=2)
    scales, tables, *_ = rotation(draw, product, heads, 64, 24, jnp.float32)
    keys, values = (jnp.full((21, heads, page, 64), jnp.nan) for _ in range(2))
    table = jnp.asarray(1 + draw.generator.permutation(20).reshape(4, 5), jnp.int32).at[2].set(0)
    length = jnp.array([0, page * 5 - rows, 10**6, 6], jnp.int32)
    pack = Packing(rows, heads, 2) if packed else None
    arguments = product, scales, tables, keys, values, length, 0, pack, table
    (ours, *caches), (wanted, *wanted_caches) = gpu.rotate_and_store(*arguments), reference.rotate_and_store(*arguments)
    if pack:
        used = np.asarray(pack.packed(jnp.ones((4, rows, 4, 64)))) == 1
        ours = jnp.where(used, ours, 0)
    assert_close(ours, wanted)
    # The same rows in dense caches; the bin may hold those of anybody's that wait.
    _, *dense = reference.rotate_and_store(
        product, scales, tables, *(jnp.full((4, heads, 5 * page, 64), jnp.nan) for _ in range(2)), length
    )
    for cache, wanted_cache, of_request in zip(caches, wanted_caches, dense, strict=True):
        assert_close(cache[1:], wanted_cache[1:])
        for b in (0, 1, 3):
            own = wanted_cache[table[b]].swapaxes(0, 1).reshape(heads, -1, 64)
            np.testing.assert_array_equal(own, of_request[b])
        assert np.sum(~np.isnan(np.asarray(cache[1:]))) == 3 * rows * heads * 64


def all_operations(product, x, scale, rest):
    q, keys, values = gpu.rotate_and_store(product, *rest)
    return gpu.gated(product, x.dtype), *jax.tree.leaves(gpu.add(x, product, scale)), q, keys, values


def test_rows_before_the_gate_are_the_same_bit_for_bit_with_and_without_an_adapter(kernels):
    draw = Draw(5)
    product = heads_product(draw, 2, 7, 4, 2, 64, splits=2, squares=3, rank=16, first_row=4)
    rest = rotation(draw, product, 2, 64, 24, jnp.float32)
    operands = draw(2, 7, product.columns), draw(product.columns), rest
    adapted = all_operations(product, *operands)
    plain = all_operations(replace(product, expand=None), *operands)
    for i, (ours, wanted) in enumerate(zip(adapted[:-2], plain[:-2], strict=True)):
        # Sums of squares may be summed in another order.
        np.testing.assert_allclose(ours[:, :4], wanted[:, :4], rtol=1e-6 if i == 3 else 0)
        assert not np.array_equal(ours[:, 4:], wanted[:, 4:])
    for ours, wanted in zip(adapted[-2:], plain[-2:], strict=True):
        for request, start in enumerate(rest[-1]):
            slots = slice(start, start + 4)
            np.testing.assert_array_equal(ours[request, :, slots], wanted[request, :, slots])


def test_requests_do_not_touch_each_other_whatever_their_neighbours_hold(kernels):
    draw = Draw(6)
    product = heads_product(draw, 3, 5, 4, 2, 64, splits=2, squares=3, rank=16, first_row=2)
    x, scale, rest = draw(3, 5, product.columns), draw(product.columns), rotation(draw, product, 2, 64, 24, jnp.float32)
    neighbours = (slice(None), jnp.array([0, 2]))
    poisoned = replace(product, parts_SBWC=product.parts_SBWC.at[neighbours].set(jnp.nan))
    results = [all_operations(each, x, scale, rest) for each in (poisoned, product)]
    for ours, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(ours[1], wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 128])
@pytest.mark.parametrize(("batch", "splits"), [(1, 4), (32, 2), (64, 1)])
def test_on_the_chip_kernels_at_the_size_of_qwen3_are_near_the_reference_and_repeat_bit_by_bit(batch, splits, rank):
    draw, dtype = Draw(7), jnp.bfloat16
    brought = dict(squares=64, rank=rank, first_row=4, dtype=dtype, splits=splits)
    residual = draw(batch, 7, 4096, dtype=dtype), make_product(draw, batch, 7, (4096,), **brought), draw(4096)
    gate_up = make_product(draw, batch, 7, (12288, 12288), **brought), dtype
    qkv = heads_product(draw, batch, 7, 32, 8, 128, **brought)
    rotated = qkv, *rotation(draw, qkv, 8, 128, 64, dtype)
    for name, arguments in (("add", residual), ("gated", gate_up), ("rotate_and_store", rotated)):
        static = 1 if name == "gated" else ()
        ours, again = (jax.jit(getattr(gpu, name), static_argnums=static)(*arguments) for _ in range(2))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), again, ours)
        wanted = getattr(reference, name)(*arguments)
        if name == "add":
            # An entry may round the other way: the squares are those of the rounded sum, whichever it is.
            (x, ours), (x_wanted, wanted) = ours, wanted
            assert_close((x, ours.values_BWD), (x_wanted, wanted.values_BWD))
            ours, wanted = ours.squares_BWT, reference.scale_rows(x, residual[2]).squares_BWT
        assert_close(ours, wanted)


def choose(implementation="auto", rows=7, dtype=jnp.bfloat16, head_dim=128, lacking=None):
    return api.choose(implementation, jnp.zeros((2, rows), jnp.int32), dtype, head_dim, lambda: lacking)


def test_without_hopper_auto_is_plain_jax_and_an_explicit_choice_is_refused(caplog):
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert [choose(), choose()] == ["xla", "xla"]
    if not ON_GPU:
        assert [record.message for record in caplog.records] == [
            "decode layer: xla on cpu (triton: needs a Hopper GPU (compute capability 9.0), not cpu)"
        ]
        with pytest.raises(ValueError, match="does not run here: needs a Hopper GPU"):
            choose("triton")
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        choose("fast")


def test_on_hopper_auto_takes_the_kernels_where_they_can_run(monkeypatch):
    monkeypatch.setattr(api, "_obstacle", lambda: None)
    assert choose() == ("triton" if pallas_kernels.BY_DEFAULT else "xla")
    assert choose("triton") == "triton"
    monkeypatch.setattr(pallas_kernels, "BY_DEFAULT", True)
    assert choose() == "triton" and choose("xla") == "xla"
    assert api.by_default(jnp.dtype("bfloat16")) and not api.by_default(jnp.dtype("float32"))
    refusals = {
        "float32: must be": dict(dtype=jnp.dtype("float32")),
        "65 window rows": dict(rows=65),
        "head_dim 96": dict(head_dim=96),
        "stacked layers": dict(lacking="stacked layers"),
    }
    for message, changes in refusals.items():
        assert choose(**changes) == "xla"
        with pytest.raises(ValueError, match=message):
            choose("triton", **changes)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        assert choose("triton") == "triton"


@pytest.mark.aot
@pytest.mark.skipif(
    not HAS_TRITON or find_spec("jax_cuda13_plugin") is None, reason="needs Triton and the CUDA plug-in"
)
def test_a_step_compiles_for_one_and_two_h100s_in_few_launches_without_spills_and_without_copies_of_the_cache():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.decode_layer_aot"]
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = str(root)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=root)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
