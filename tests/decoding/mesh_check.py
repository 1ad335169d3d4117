"""Decode on one device and on meshes of 8 simulated ones, and compare the texts; run by test_mesh.py."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402

from idlm_jax.backbone.adapter import Adapter  # noqa: E402
from idlm_jax.backbone.qwen3 import Qwen3  # noqa: E402
from idlm_jax.backbone.sharding import MESH_AXES, ShardingRules, weight_sharding  # noqa: E402
from idlm_jax.backbone.weights import build_params, init_params  # noqa: E402
from idlm_jax.decoding.generate import SamplingParams, generate_tokens  # noqa: E402
from idlm_jax.decoding.sampling import COUPLINGS  # noqa: E402
from idlm_jax.decoding.step import Policy  # noqa: E402
from idlm_jax.decoding.window import LAYOUTS  # noqa: E402
from tests.decoding.support import tiny_adapter, tiny_config  # noqa: E402

CONFIG = tiny_config(vocab_size=64)
# Of several lengths, so that they do not fill the batch, and greedy beside sampled.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [20, 21, 22], [30, 31, 32, 33, 34], [5, 6]]
SAMPLING = [SamplingParams(temperature=t, top_k=k, seed=i, max_tokens=12) for i, (t, k) in
            enumerate([(0.0, 0), (1.0, 0), (0.8, 20), (0.0, 0), (1.3, 0)])]  # fmt: skip
# Meshes (data, fsdp, tp): heads and vocabulary split; requests too; and a batch of 8 that 2 devices share.
MESHES = [(1, 1, 2), (2, 1, 2), (4, 1, 2)]
POLICIES = {
    "greedy and gumbel, branches": Policy(3, LAYOUTS["branch"], COUPLINGS["gumbel"]),
    "AR": Policy(1, LAYOUTS["branch"], COUPLINGS["gumbel"]),
    "ratio": Policy(3, LAYOUTS["standard"], COUPLINGS["ratio"]),
}


def model_on(mesh: Mesh | None) -> Qwen3:
    """The tiny model with an adapter, whole or laid out by the rules."""
    params, adapter = init_params(CONFIG, jax.random.key(0), jnp.dtype("float32")), tiny_adapter(CONFIG)
    if mesh is None:
        return Qwen3(CONFIG, params, adapter)
    params = jax.device_put(params, build_params(CONFIG, weight_sharding(mesh)))
    specs = ShardingRules().adapter_specs(CONFIG, adapter.config, mesh)
    layers = [
        {
            module: {
                name: {
                    side: jax.device_put(x, NamedSharding(mesh, jax.P(*specs[module][name][side][1:])))
                    for side, x in ab.items()
                }
                for name, ab in names.items()
            }
            for module, names in layer.items()
        }
        for layer in adapter.params["layers"]
    ]
    return Qwen3(CONFIG, params, Adapter(adapter.config, {**adapter.params, "layers": layers}))


def main() -> None:
    for name, policy in POLICIES.items():
        wanted = generate_tokens(model_on(None), PROMPTS, SAMPLING, policy)
        for shape in MESHES:
            mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[: int(np.prod(shape))])
            with jax.set_mesh(mesh):
                ours = generate_tokens(model_on(mesh), PROMPTS, SAMPLING, policy)
            for mine, other in zip(ours, wanted, strict=True):
                np.testing.assert_array_equal(mine.tokens, other.tokens, err_msg=f"{name} {shape}")
                np.testing.assert_array_equal(mine.history, other.history, err_msg=f"{name} {shape}")
            print(name, shape, "ok", flush=True)


if __name__ == "__main__":
    main()
