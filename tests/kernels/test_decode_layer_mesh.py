"""The kernels between the products of decode layers on two GPUs, beside plain JAX there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.sharding import MESH_AXES, cache_spec
from idlm_jax.backbone.weights import Params, fuse_projections
from idlm_jax.decoding.forward import forward
from tests.decoding.support import laid_out, tiny_config
from tests.decoding.test_forward import GATE, adapter_of, cache_of, of_model, params_apart, window
from tests.kernels.interpreted_triton import ON_GPU


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU or jax.device_count() < 2, reason="needs two GPUs")
def test_on_two_chips_the_kernels_are_as_near_to_float32_as_plain_jax() -> None:
    config = tiny_config(hidden_size=512, intermediate_size=1024, num_attention_heads=8, head_dim=64)
    mesh = jax.make_mesh((1, 1, 2), MESH_AXES, devices=jax.devices()[:2])
    adapter = adapter_of(config).astype(jnp.bfloat16)

    def params(dtype: type) -> Params:
        scaled = jax.tree.map(lambda leaf: leaf / 4 if leaf.ndim == 2 else leaf, params_apart(config))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), scaled)

    exact = Qwen3(config, fuse_projections(params(jnp.float32)), adapter.astype(jnp.float32))
    wanted = jax.device_get(jax.tree.leaves(of_model(exact, GATE)))
    model = laid_out(config, params(jnp.bfloat16), adapter, mesh)
    cache = jax.device_put(cache_of(model), NamedSharding(mesh, cache_spec(mesh, 1, config.num_key_value_heads)))

    def errors(kernels: str) -> np.ndarray:
        run = jax.jit(forward, static_argnums=(6, 7))
        with model.on_its_mesh():
            ours = jax.device_get(jax.tree.leaves(run(model, *window(config), cache, GATE, kernels)))
        pairs = zip(ours, wanted, strict=True)
        return np.array([np.sqrt(np.mean(np.square(np.float32(got) - want))) for got, want in pairs])

    by_kernels, by_plain = errors("auto"), errors("xla")
    assert by_kernels[0] != by_plain[0], "plain JAX ran twice"
    assert np.all(by_kernels < 1.2 * by_plain), (by_kernels, by_plain)
