"""The forward pass by few launches over simulated devices, with the reference operations; run by test_mesh.py."""

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from idlm_jax.backbone.qwen3 import Qwen3  # noqa: E402
from idlm_jax.backbone.sharding import MESH_AXES, cache_spec  # noqa: E402
from idlm_jax.backbone.weights import Params, fuse_projections  # noqa: E402
from idlm_jax.config import ModelConfig  # noqa: E402
from idlm_jax.decoding.cache import Cache, init_cache  # noqa: E402
from idlm_jax.decoding.forward import forward  # noqa: E402
from idlm_jax.decoding.generate import SamplingParams, generate_tokens  # noqa: E402
from pallas_kernels.decode_layer import product  # noqa: E402
from tests.decoding.helpers import copied_to_pages, drafting_adapter, drafting_config, drafting_params, make_policy  # noqa: E402
from tests.decoding.operations import by_operations  # noqa: E402
from tests.decoding.support import laid_out, tiny_config  # noqa: E402
from tests.decoding.test_forward import ALL, GATE, SOME, adapter_of, assert_same, params_apart, params_of  # noqa: E402

BATCH, ROWS, SLOTS, PAGE = 4, 5, 48, 16
LENGTHS = jnp.array([7, 43, 0, 27])
TABLE = jnp.asarray(1 + np.random.default_rng(4).permutation(20)[: BATCH * SLOTS // PAGE].reshape(BATCH, -1), jnp.int32)
EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
# Family, projections of the adapter (None: no adapter), first adapted row, the mesh (data, fsdp, tp), summands.
CASES = {
    "qwen3": (tiny_config(), ALL, GATE, (1, 1, 2), 4),
    "qwen2": (tiny_config(model_type="qwen2"), SOME, 0, (2, 1, 2), 2),
    "llama": (tiny_config(model_type="llama", **EIGHT_HEADS), ALL, GATE, (1, 1, 4), 1),
    "biases, no adapter": (tiny_config(attention_bias=True, **EIGHT_HEADS), None, None, (1, 1, 4), 2),
    "an MLP that is not split": (tiny_config(intermediate_size=33), ALL, GATE, (1, 1, 2), 1),
}


def window(config: ModelConfig) -> tuple[jax.Array, ...]:
    """Arguments of ``forward`` between model and cache."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, ROWS))
    tokens[:, GATE:] = config.mask_token_id
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((ROWS, ROWS), bool)), (BATCH, ROWS, ROWS))
    return jnp.asarray(tokens), LENGTHS[:, None] + jnp.arange(ROWS), LENGTHS, mask


def cache_of(model: Qwen3, paged: bool) -> Cache:
    """Full of numbers that bfloat16 holds exactly."""
    config, generator = model.config, np.random.default_rng(2)
    dense = init_cache(config, BATCH, SLOTS, jnp.bfloat16)
    dense = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), dense)
    dense = jax.tree.map(lambda x: x.astype(model.dtype), dense)
    return copied_to_pages(init_cache(config, 21, PAGE, model.dtype), dense, TABLE) if paged else dense


def run(model: Qwen3, gate: int | None, kernels: str, paged: bool, mesh: Mesh | None) -> list[np.ndarray]:
    """Hidden states and caches, whole."""
    cache, pages = cache_of(model, paged), TABLE if paged else None
    if mesh is not None:
        heads = model.config.num_key_value_heads
        cache = jax.device_put(cache, NamedSharding(mesh, cache_spec(mesh, 1 if paged else BATCH, heads)))
        pages = None if pages is None else jax.device_put(pages, NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(forward, static_argnums=(6, 7))
    with model.on_its_mesh():
        return jax.tree.leaves(jax.device_get(jitted(model, *window(model.config), cache, gate, kernels, pages)))


def check_forward() -> None:
    """In every case, with the model that ``load`` would make, by operations and by the model itself."""
    for name, (config, targets, gate, shape, splits) in CASES.items():
        mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[: int(np.prod(shape))])
        adapter = None if targets is None else adapter_of(config, targets)
        one = Qwen3(config, params_of(config), adapter)
        for paged in (False, True):
            if paged and shape[0] > 1:
                continue  # pages are all requests', which is not split then
            wanted = run(one, gate, "xla", paged, None)
            with by_operations() as used, pytest.MonkeyPatch.context() as patch:
                patch.setattr(product, "splits_of", lambda *_, splits=splits: splits)
                model = laid_out(config, params_apart(config), adapter, mesh)
                assert_same(run(model, gate, "auto", paged, mesh), wanted)
                assert used["add"] == 2 * config.num_hidden_layers
                assert_same(run(model, gate, "xla", paged, mesh), wanted)
                assert used["add"] == 2 * config.num_hidden_layers
            print(name, shape, "paged" if paged else "dense", "ok", flush=True)


def check_rounding() -> None:
    """In bfloat16 it is no farther from float32 than the model is, also where devices round before they add up."""
    config = tiny_config(hidden_size=256, intermediate_size=512, **EIGHT_HEADS)
    mesh = jax.make_mesh((1, 1, 4), MESH_AXES)
    adapter = adapter_of(config).astype(jnp.bfloat16)

    def params(dtype: type) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), params_apart(config))

    exact = Qwen3(config, fuse_projections(params(jnp.float32)), adapter.astype(jnp.float32))
    wanted = run(exact, GATE, "xla", False, None)[0]

    def error(kernels: str) -> float:
        hidden = run(laid_out(config, params(jnp.bfloat16), adapter, mesh), GATE, kernels, False, mesh)[0]
        return float(np.sqrt(np.mean(np.square(hidden.astype(np.float32) - wanted))))

    with by_operations(), pytest.MonkeyPatch.context() as patch:
        of_model, few_rows = error("xla"), error("auto")
        jax.clear_caches()
        patch.setattr(product, "_FEW_ROWS", 0)
        patch.setattr(product, "_FLOAT32_ROWS", 0)
        many_rows = error("auto")
    assert 0 < few_rows < many_rows < of_model, (few_rows, many_rows, of_model)
    print("rounding ok", flush=True)


def check_refusal() -> None:
    """Weights that are split over the requests' axis are said to be in the way."""
    config = tiny_config()
    mesh = jax.make_mesh((1, 2, 2), MESH_AXES)
    with (
        by_operations(),
        pytest.raises(ValueError, match="'triton' does not run here: weights split over the axis fsdp"),
    ):
        run(laid_out(config, params_apart(config), None, mesh), None, "triton", False, mesh)
    print("refusal ok", flush=True)


def check_texts() -> None:
    """Of a gated adapter, greedy and sampled, copies of the model on two devices each."""
    config, prompts = drafting_config(), [[1, 2, 3, 4, 5, 6, 7], [9], [20, 21, 22], [5, 6]]
    sampling = [SamplingParams(t, seed=i, max_tokens=12) for i, t in enumerate((0.0, 1.0, 0.8, 0.0))]
    one = Qwen3(config, drafting_params(), drafting_adapter())
    wanted = generate_tokens(one, prompts, sampling, make_policy(3))
    mesh = jax.make_mesh((2, 1, 2), MESH_AXES)
    with by_operations() as used:
        ours = generate_tokens(
            laid_out(config, drafting_params(), drafting_adapter(), mesh), prompts, sampling, make_policy(3)
        )
    assert used["add"]
    for mine, other in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(mine.tokens, other.tokens)
        np.testing.assert_array_equal(mine.history, other.history)
    print("texts ok", flush=True)


if __name__ == "__main__":
    check_forward()
    check_rounding()
    check_refusal()
    check_texts()
