"""Write what our code computes for tiny training steps, for the PyTorch peer to compare itself with.

    python scripts/write_two_stream_check.py two_stream.npz         # where idlm_jax and jax are
    python scripts/peers/train_two_stream.py --check two_stream.npz       # where torch, transformers and peft are

For each tiny case of the peer, in float32: tokens, group starts, weights under the names of a Hugging Face and a PEFT
checkpoint, the loss, the gradients of all trained weights, and the count of useful FLOPs.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_train_step import model_config

from idlm_jax.backbone.adapter import AdapterConfig
from idlm_jax.backbone.weights import weight_table
from idlm_jax.config import ModelConfig
from idlm_jax.training.groups import Batch, GroupPolicy, draw_groups
from idlm_jax.training.metrics import useful_flops
from idlm_jax.training.objective import Losses, Objective, training_loss
from idlm_jax.training.params import ADAPTER, MASK_EMBEDDING, Flat, ModelBuilder, split_trained

CONFIG = model_config("tiny")
BATCH, LENGTH, RANK = 2, 200, 4
POLICY = GroupPolicy(3)
CASES = {
    "tiny": (CONFIG, Objective("full", POLICY)),
    "tiny-tied": (CONFIG.replace(tie_word_embeddings=True), Objective("full", POLICY)),
    "tiny-gated": (CONFIG, Objective("gated-lora", POLICY, noisy_loss="tv")),
}


def random_params(builder: ModelBuilder, key: jax.Array) -> Flat:
    """Stacked weights large enough that every part matters; norms near one."""
    shapes = builder.shapes()
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    noise = {name: 0.2 * jax.random.normal(keys[name], shape, jnp.float32) for name, shape in shapes.items()}
    return {name: 1 + array if name.endswith("scale") else array for name, array in noise.items()}


def under_hf_names(flat: Flat, config: ModelConfig) -> dict[str, np.ndarray]:
    """Those of ``flat`` that are there, layer by layer, in the shapes of Hugging Face and PEFT."""
    named = {}
    for weight in weight_table(config):
        parts = weight.path.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else None
        name = weight.path if layer is None else ".".join([parts[0], *parts[2:]])
        module = weight.hf_name.removesuffix(".weight")
        if name in flat:
            array = np.asarray(flat[name] if layer is None else flat[name][layer])
            named[weight.hf_name] = array.T if weight.transpose else array
        adapter = f"{ADAPTER}.{name.removesuffix('.kernel')}"
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
            if layer is not None and f"{adapter}.{ours}" in flat:
                named[f"{module}.{theirs}.weight"] = np.asarray(flat[f"{adapter}.{ours}"][layer]).T
    if MASK_EMBEDDING in flat:
        named["mask_embedding"] = np.asarray(flat[MASK_EMBEDDING])
    return named


def compute(config: ModelConfig, objective: Objective) -> dict[str, Any]:
    """All that the peer needs of one case."""
    gated = objective.mode == "gated-lora"
    adapter = AdapterConfig(RANK, 2 * RANK) if gated else None
    builder = ModelBuilder(config, adapter, "float32")
    trained, frozen = split_trained(random_params(builder, jax.random.key(1)), objective.mode, (), "float32")
    shape = (BATCH, LENGTH)
    batch = Batch(
        jax.random.randint(jax.random.key(2), shape, 0, config.vocab_size - 1),
        jnp.ones(shape, jnp.int32),
        jnp.broadcast_to(jnp.arange(LENGTH), shape),
        jnp.ones(shape, bool),
    )
    key = jax.random.key(3)
    starts = draw_groups(batch, POLICY, 255, key).key_end[:, :: POLICY.block_size]

    @partial(jax.value_and_grad, has_aux=True)
    def loss(trained: Flat) -> tuple[jax.Array, Losses]:
        losses = training_loss(builder.build({**frozen, **trained}), batch, objective, key)
        return losses.total, losses

    (total, losses), gradients = jax.jit(loss)(trained)
    rows = {"noisy_rows": int(losses.noisy_rows), "clean_rows": int(losses.clean_rows)}
    flops = useful_flops(
        config,
        objective.mode,
        tokens=BATCH * LENGTH,
        length=LENGTH,
        block_size=POLICY.block_size,
        rank=RANK if gated else 0,
        soft=objective.noisy_loss != "ce",
        **rows,
    )
    named = {f"weight/{name}": array for name, array in under_hf_names({**frozen, **trained}, config).items()}
    named |= {f"gradient/{name}": array for name, array in under_hf_names(gradients, config).items()}
    numbers = {"loss": total, "useful_flops": flops, **rows}
    return {"tokens": np.asarray(batch.tokens), "starts": np.asarray(starts), **numbers, **named}


def main() -> None:
    """Compute and write both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    jax.config.update("jax_default_matmul_precision", "highest")
    cases = {name: compute(*case) for name, case in CASES.items()}
    arrays: dict[str, Any] = {f"{name}/{key}": array for name, case in cases.items() for key, array in case.items()}
    np.savez(file, **arrays)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
