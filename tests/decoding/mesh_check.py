"""Decode on one device and on meshes of 8 simulated ones, and compare the texts; run by test_mesh.py."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from idlm_jax.backbone.qwen3 import Qwen3  # noqa: E402
from idlm_jax.backbone.sharding import MESH_AXES  # noqa: E402
from idlm_jax.backbone.weights import init_params  # noqa: E402
from idlm_jax.decoding.generate import SamplingParams, generate_tokens  # noqa: E402
from idlm_jax.decoding.sampling import COUPLINGS  # noqa: E402
from idlm_jax.decoding.step import Policy  # noqa: E402
from idlm_jax.decoding.window import LAYOUTS  # noqa: E402
from idlm_jax.serving.pages import Pages  # noqa: E402
from tests.decoding import test_paged  # noqa: E402
from tests.decoding.support import laid_out, tiny_adapter, tiny_config  # noqa: E402

CONFIG = tiny_config(vocab_size=64)
# Of several lengths, so that they do not fill the batch, and greedy beside sampled.
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [20, 21, 22], [30, 31, 32, 33, 34], [5, 6]]
SAMPLING = [SamplingParams(temperature=t, top_k=k, seed=i, max_tokens=12) for i, (t, k) in
            enumerate([(0.0, 0), (1.0, 0), (0.8, 20), (0.0, 0), (1.3, 0)])]  # fmt: skip
# A policy, how many of the prompts, and meshes (data, fsdp, tp): heads and vocabulary split; requests too; a device for
# every request of the batch; and a request that several devices have.
CASES = {
    "greedy and gumbel, branches": (Policy(3, LAYOUTS["branch"], COUPLINGS["gumbel"]), 5, [(2, 1, 2)]),
    "ratio": (Policy(3, LAYOUTS["standard"], COUPLINGS["ratio"]), 5, [(4, 1, 2)]),
    "AR": (Policy(1, LAYOUTS["branch"], COUPLINGS["gumbel"]), 1, [(2, 1, 2)]),
}


def model_on(mesh: Mesh | None) -> Qwen3:
    """The tiny model with an adapter, whole or laid out by the rules."""
    params, adapter = init_params(CONFIG, jax.random.key(0), jnp.dtype("float32")), tiny_adapter(CONFIG)
    if mesh is None:
        return Qwen3(CONFIG, params, adapter)
    return laid_out(CONFIG, params, adapter, mesh)


def check_pages() -> None:
    """A cache of pages split over heads gives the texts of a dense one."""
    test_paged.paged.PAGE = test_paged.PAGE
    policy, _, _ = CASES["greedy and gumbel, branches"]
    prompts, sampling = ((what * 2)[: test_paged.BATCH] for what in (PROMPTS, SAMPLING))
    wanted = generate_tokens(model_on(None), prompts, sampling, policy)
    mesh = jax.make_mesh((1, 1, 2), MESH_AXES, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        pages = Pages(60, test_paged.PAGE)
        ours, _ = test_paged.decode_in_pages(model_on(mesh), prompts, sampling, policy, pages)
    for mine, other in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(mine.tokens, other.tokens)
    print("pages ok", flush=True)


def main() -> None:
    """Compare tokens, and what each round accepted."""
    check_pages()
    for name, (policy, count, meshes) in CASES.items():
        given = PROMPTS[:count], SAMPLING[:count], policy
        wanted = generate_tokens(model_on(None), *given)
        for shape in meshes:
            mesh = jax.make_mesh(shape, MESH_AXES, devices=jax.devices()[: int(np.prod(shape))])
            ours = generate_tokens(model_on(mesh), *given)
            for mine, other in zip(ours, wanted, strict=True):
                np.testing.assert_array_equal(mine.tokens, other.tokens, err_msg=f"{name} {shape}")
                np.testing.assert_array_equal(mine.history, other.history, err_msg=f"{name} {shape}")
            print(name, shape, "ok", flush=True)


if __name__ == "__main__":
    main()
