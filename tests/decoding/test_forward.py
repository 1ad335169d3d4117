"""The forward pass by few launches: with the reference operations it is the model's own, summed in another order."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.adapter import TARGET_MODULES, Adapter, AdapterConfig, absorb, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.weights import Params, abstract_params, fuse_projections
from idlm_jax.config import ModelConfig
from idlm_jax.decoding import forward as forward_module
from idlm_jax.decoding.cache import attend_window, cached_attention, init_cache, init_pools
from idlm_jax.decoding.forward import forward, forward_by
from pallas_kernels.decode_attention.packing import Packing
from pallas_kernels.decode_layer import product, reference
from tests.decoding.helpers import copied_to_pages
from tests.decoding.support import tiny_config
from tests.support import relative_error

FAMILIES = {
    "qwen3": tiny_config(),
    "llama": tiny_config(model_type="llama"),
    "qwen2": tiny_config(model_type="qwen2"),
}
POOLS = [(2, 48), (3, 32)]
ROWS, GATE = 5, 2
LENGTHS = jnp.array([7, 43, 0, 27, 12])


@cache
def _params(config: ModelConfig) -> Params:
    shapes, tree = jax.tree.flatten(abstract_params(config, jnp.float32))
    generator = np.random.default_rng(0)
    leaves = [0.3 * generator.normal(size=leaf.shape) + (leaf.ndim == 1) for leaf in shapes]
    return jax.tree.unflatten(tree, map(jnp.float32, leaves))


def params_apart(config: ModelConfig) -> Params:
    """Random parameters, also of norms and biases; the lists and dicts are the caller's own."""
    return jax.tree.map(lambda leaf: leaf, _params(config))


def params_of(config: ModelConfig) -> Params:
    """Those parameters, fused."""
    return fuse_projections(params_apart(config))


def adapter_of(config: ModelConfig, targets: tuple[str, ...] = tuple(TARGET_MODULES)) -> Adapter:
    settings = AdapterConfig(rank=6, alpha=12, target_modules=targets)
    adapter = init_adapter(config, settings, jax.random.key(2), jnp.float32, b_scale=0.3)
    return Adapter(settings, {**adapter.params, "mask_embedding": jnp.ones(config.hidden_size)})


def window(config: ModelConfig) -> tuple:
    """Arguments of ``forward`` after the model, without cache."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (len(LENGTHS), ROWS))
    tokens[:, GATE:] = config.mask_token_id
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((ROWS, ROWS), bool)), (len(LENGTHS), ROWS, ROWS))
    return jnp.asarray(tokens), LENGTHS[:, None] + jnp.arange(ROWS), LENGTHS, mask


def cache_of(model: Qwen3) -> tuple:
    """Full of numbers that bfloat16 holds exactly."""
    generator = np.random.default_rng(2)
    empty = init_pools(model.config, POOLS, model.dtype)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), jnp.bfloat16).astype(x.dtype), empty)


@partial(jax.jit, static_argnums=1)
def of_model(model: Qwen3, gate: int | None) -> tuple:
    tokens, positions, length, mask = window(model.config)
    return model(tokens, positions, cached_attention(length, mask), cache_of(model), gate)


@partial(jax.jit, static_argnums=1)
def of_operations(model: Qwen3, gate: int | None) -> tuple:
    return forward_by(reference, model, *window(model.config), cache_of(model), gate, "xla")


def assert_same(ours: tuple, wanted: tuple) -> None:
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert relative_error(np.asarray(got), np.asarray(want)) < 2e-5


ALL, SOME = tuple(TARGET_MODULES), ("q_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("family", "targets", "gate", "splits"),
    [("qwen3", ALL, GATE, 4), ("qwen2", SOME, 0, 2), ("llama", ALL, None, 1), ("llama", (), None, 4)],
)
def test_forward_by_operations_equals_the_model(
    family: str, targets: tuple[str, ...], gate: int | None, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "splits_of", lambda *_: splits)
    config = FAMILIES[family]
    adapter, params = adapter_of(config, targets), params_of(config)
    wanted = of_model(Qwen3(config, params_of(config), adapter), gate)
    absorbed = Qwen3(config, params, absorb(config, params, adapter))
    assert_same(of_operations(absorbed, gate), wanted)
    if targets:
        assert_same(of_model(absorbed, gate), wanted)


class PackedAttention:
    """In place of a kernel that wants packed queries: what was asked for, and attention of what was then given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forward_module, "packing", self.packing)
        monkeypatch.setattr(forward_module, "packed_window_attention", self.attend)
        self.asked: list[tuple] = []

    def packing(self, kernels: str, q: jax.ShapeDtypeStruct, k: jax.Array, paged: bool) -> Packing:
        self.asked.append((kernels, q.shape, q.dtype, paged))
        return Packing(ROWS, k.shape[1], q.shape[2] // k.shape[1])

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: jax.Array | None,
        prefix: jax.Array,
        mask: jax.Array,
        pack: Packing,
    ) -> jax.Array:
        assert q.shape == pack.shape(len(prefix), k.shape[-1])
        one_tile = q[:, :, 0, : ROWS * pack.group].reshape(*q.shape[:2], ROWS, pack.group, -1).swapaxes(1, 2)
        unpacked = one_tile.reshape(len(prefix), ROWS, -1, k.shape[-1])
        return attend_window(unpacked, k, v, pages, prefix, mask, "xla")


def test_attention_that_wants_packed_queries_gets_them_pool_by_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    config, kernel = FAMILIES["qwen3"], PackedAttention(monkeypatch)
    model = Qwen3(config, params_of(config))
    ours = forward_by(reference, model, *window(config), cache_of(model), None, "auto")
    assert_same(ours, of_model(model, None))
    shapes = [(requests, ROWS, config.num_attention_heads, config.head_dim) for requests, _ in POOLS]
    assert kernel.asked == [("auto", shape, jnp.float32, False) for shape in shapes] * config.num_hidden_layers


@pytest.mark.parametrize("by", ["model", "operations", "packed"])
def test_over_pages_it_is_the_same_as_over_a_dense_cache(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, page, slots, count = FAMILIES["qwen3"], 16, max(slots for _, slots in POOLS), len(LENGTHS)
    model = Qwen3(config, params_of(config))
    generator = np.random.default_rng(3)
    dense = init_cache(config, count, slots, model.dtype)
    dense = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), dense)
    table = jnp.asarray(1 + generator.permutation(20)[: count * slots // page].reshape(count, -1), jnp.int32)
    # What is nobody's may be anything.
    nobodys = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), init_cache(config, 21, page, model.dtype))
    pages = copied_to_pages(nobodys, dense, table)
    wanted_hidden, wanted_dense = jax.jit(forward)(model, *window(config), dense)
    if by == "model":
        hidden, pages = jax.jit(forward)(model, *window(config), pages, pages_BN=table)
    else:
        kernel = PackedAttention(monkeypatch) if by == "packed" else None
        hidden, pages = forward_by(reference, model, *window(config), pages, None, "xla", table)
        assert kernel is None or {paged for *_, paged in kernel.asked} == {True}
    taken = table.ravel()
    wanted_pages, pages_taken = (
        [array[taken] for array in jax.tree.leaves(cache)]
        for cache in (copied_to_pages(nobodys, wanted_dense, table), pages)
    )
    assert_same((hidden, pages_taken), (wanted_hidden, wanted_pages))
    for array in jax.tree.leaves(pages):
        assert np.isnan(np.delete(array, taken, axis=0)).all()


def test_in_bfloat16_it_is_no_farther_from_float32_than_the_model() -> None:
    config = FAMILIES["qwen3"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(config))
    adapter = adapter_of(config).astype(jnp.bfloat16)
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact = of_model(Qwen3(config, in_float32, adapter.astype(jnp.float32)), GATE)[0]

    def error(hidden: jax.Array) -> float:
        return float(jnp.sqrt(jnp.mean(jnp.square(hidden.astype(jnp.float32) - exact))))

    plain = error(of_model(Qwen3(config, params, adapter), GATE)[0])
    absorbed = Qwen3(config, params, absorb(config, params, adapter))
    assert 0 < error(of_operations(absorbed, GATE)[0]) <= plain


def test_rows_before_the_gate_are_the_same_bit_for_bit_whatever_the_adapter() -> None:
    config = FAMILIES["qwen3"]
    outputs = []
    for factor in (0.0, 5.0):
        adapter, params = adapter_of(config), params_of(config)
        absorbed = absorb(config, params, adapter).params["layers"]
        adapter = Adapter(adapter.config, {"layers": jax.tree.map(partial(jnp.multiply, factor), absorbed)})
        outputs.append(of_operations(Qwen3(config, params, adapter), GATE)[0])
    np.testing.assert_array_equal(outputs[0][:, :GATE], outputs[1][:, :GATE])
    assert not np.array_equal(outputs[0][:, GATE:], outputs[1][:, GATE:])


def test_without_a_gpu_the_model_itself_runs_and_kernels_that_are_asked_for_are_refused() -> None:
    model = Qwen3(FAMILIES["qwen3"], params_of(FAMILIES["qwen3"]))
    arguments = model, *window(model.config), cache_of(model), GATE
    jax.tree.map(np.testing.assert_array_equal, jax.jit(forward, static_argnums=6)(*arguments), of_model(model, GATE))
    with pytest.raises(ValueError, match=r"'triton' does not run here: .*not cpu"):
        forward(*arguments, kernels="triton")


@pytest.mark.parametrize("inputs", [96, 4096])
def test_a_single_row_is_multiplied_twice_for_half_the_sum_each(inputs: int) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 1, inputs), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (inputs, 64), jnp.bfloat16)
    made = product.multiply(x, kernel, None, None, 64, 1e-6)
    assert made.parts_SBWC.shape == (2 * product.splits_of(1, inputs, 64), 1, 1, 64)
    wanted = np.float64(x[0, 0]) @ np.float64(kernel)
    np.testing.assert_allclose(made.finished()[0, 0], wanted, rtol=1e-5, atol=1e-3)
