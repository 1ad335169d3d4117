"""The verbs that decode over four simulated devices, and over one; run by test_mesh.py."""

import contextlib
import io
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from idlm_jax.backbone.adapter import Adapter, AdapterConfig, init_adapter  # noqa: E402
from idlm_jax.checkpoint.open import open_source  # noqa: E402
from idlm_jax.checkpoint.peft import save_adapter  # noqa: E402
from idlm_jax.cli import main as cli  # noqa: E402
from idlm_jax.data import synthesize  # noqa: E402
from idlm_jax.data.tokens import TokenStore  # noqa: E402
from idlm_jax.errors import UserError  # noqa: E402
from idlm_jax.model import load  # noqa: E402
from tests.cli.decoding_support import TINY, json_lines  # noqa: E402

MESHES = ([], ["--tp", "2"], ["--tp", "2", "--data-parallel", "2"])
LOAD = ("--dtype", "float32", "--mask-token", "0")


def run(*arguments: object) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


def make_adapter(folder: Path) -> Path:
    """A random adapter for the tiny model."""
    config = open_source(TINY).config
    made = init_adapter(config, AdapterConfig(rank=4, alpha=8), jax.random.key(1), jnp.dtype("float32"), 0.1)
    mask_embedding = 0.1 * jax.random.normal(jax.random.key(2), (config.hidden_size,))
    save_adapter(Adapter(made.config, {**made.params, "mask_embedding": mask_embedding}), folder)
    return folder


def check_layout(adapter: Path) -> None:
    """Weights and adapter are in parts, and every device has its own."""
    model = load(TINY, adapter, "float32", 0, tp=2, data_parallel=2).model
    gate_up = model.layers[0].mlp.gate_up_proj
    for array in (gate_up.kernel[...], gate_up.loras[0].b[...], model.embedding[...]):
        assert len({str(part.index) for part in array.addressable_shards}) == 2
        assert all(2 * part.data.size == array.size for part in array.addressable_shards)


def check_refusals() -> None:
    """What would work is said, of heads and of devices."""
    for tp, data_parallel, said in (
        (4, 1, "tp must be 1 or 2, not 4 (key heads: 2, devices: 4)"),
        (1, 3, "data_parallel must be 1, 2 or 4, not 3 (devices: 4, tp: 1)"),
        (2, 4, "data_parallel must be 1 or 2, not 4 (devices: 4, tp: 2)"),
    ):
        with pytest.raises(UserError) as refused:
            load(TINY, tp=tp, data_parallel=data_parallel)
        assert str(refused.value) == said


def check_generate(adapter: Path) -> None:
    """Several prompts of several lengths, sampled, drafted by an adapter."""
    prompts = [part for text in ("12", "hello", "and then the") for part in ("--prompt", text)]
    asked = ("generate", TINY, *LOAD, "--adapter", adapter, "--raw", *prompts, "--json", "--max-tokens", 24)
    sampling = ("--temperature", 0.9, "--seed", 3)
    texts = [[line["token_ids"] for line in json_lines(run(*asked, *sampling, *mesh))] for mesh in MESHES]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 3


def check_synthesize(folder: Path) -> None:
    """Documents from places of several sizes, and from places of one, which the copies of the model split."""
    counts = ("--max-tokens", 96, "--documents", 12, "--batch-size", 8)
    stores = []
    for number, mesh in enumerate(MESHES):
        run("data", "synthesize", TINY, *LOAD, "--output", folder / str(number), *counts, *mesh)
        store = TokenStore.open(folder / str(number))
        stores.append([document.tokens.tolist() for document in map(store.__getitem__, range(len(store)))])
    assert stores[0] == stores[1] == stores[2]
    assert len(stores[0]) == 12 and max(map(len, stores[0])) > 48


if __name__ == "__main__":
    synthesize._POOLS_FROM_TOKENS = 64
    folder = Path(sys.argv[1])
    adapter = make_adapter(folder / "adapter")
    check_layout(adapter)
    check_refusals()
    print("layout")
    check_generate(adapter)
    print("generate")
    check_synthesize(folder)
    print("synthesize")
