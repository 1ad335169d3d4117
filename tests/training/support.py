"""What the training tests share: golden files of PyTorch, batches made by hand, and models in stacked form."""

import json
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from idlm_jax.backbone.weights import init_params, layer_weights, weight_table
from idlm_jax.checkpoint.hf import HFSource
from idlm_jax.checkpoint.open import load_params
from idlm_jax.config import ModelConfig
from idlm_jax.training import two_stream
from idlm_jax.training.groups import Batch, NoisyRows
from idlm_jax.training.params import Flat, ModelBuilder, flat_adapter, flat_base
from tests.decoding.support import tiny_adapter, tiny_config
from tests.support import GOLDEN

TRAINING = GOLDEN / "training"
KEY = jax.random.key(0)
# Programs of a test run once, at a size where compilation is all that takes time: this halves it.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    return load_file(TRAINING / f"{name}.safetensors")


@cache
def golden_scalars() -> dict[str, Any]:
    return json.loads((TRAINING / "training.json").read_text(encoding="utf-8"))


@cache
def golden_model(name: str) -> tuple[ModelConfig, Flat]:
    """A golden checkpoint with the oracle's mask token, float32 and stacked."""
    source = HFSource(GOLDEN / name)
    config = source.config.replace(mask_token_id=golden_scalars()["settings"]["mask_token_id"])
    return config, flat_base(load_params(source, jnp.dtype(jnp.float32)))


def batch_of(tokens: np.ndarray, loss_mask: np.ndarray, segments: np.ndarray | None = None) -> Batch:
    """A batch of rows that hold one document each, or those of ``segments`` (from 1, 0 = padding)."""
    segments = np.ones_like(tokens) if segments is None else segments
    first = np.concatenate([np.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
    positions = np.where(segments > 0, positions, 0)
    return Batch(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(segments, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(loss_mask, bool),
    )


def hf_gradients(gradient: Flat, config: ModelConfig) -> dict[str, np.ndarray]:
    """Gradients under Hugging Face names and in its shapes."""
    tree = {}
    for weight in weight_table(config):
        parts = weight.path.split(".")
        stacked = parts[0] == "layers"
        array = np.asarray(gradient[".".join([parts[0], *parts[2:]]) if stacked else weight.path])
        array = array[int(parts[1])] if stacked else array
        tree[weight.hf_name] = array.T if weight.transpose else array
    assert len(tree) >= len(layer_weights(config, 0))
    return tree


def random_batch(rows: int, length: int, vocab: int, seed: int = 0, prompt: int = 3) -> Batch:
    """Packed rows of documents of random lengths with a short prompt each and some padding at the end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length))
    segments = np.zeros((rows, length), int)
    loss_mask = np.zeros((rows, length), bool)
    for row in range(rows):
        at, segment = 0, 1
        while length - at >= prompt + 4 and segment <= 3:
            size = int(rng.integers(prompt + 3, max(prompt + 4, min(length - at, length // 2)) + 1))
            size = min(size, length - at)
            segments[row, at : at + size] = segment
            loss_mask[row, at + prompt : at + size] = True
            at, segment = at + size, segment + 1
    return batch_of(np.where(segments > 0, tokens, 0), loss_mask, segments)


def close(ours: Any, reference: Any, tolerance: float = 1e-5) -> bool:
    """Whether two arrays agree to a share of the reference's largest entry."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    return bool(np.abs(ours - reference).max() <= tolerance * max(float(np.abs(reference).max()), 1e-30))


def tiny_builder(adapter: bool = False, vocab_size: int = 6, **changes: Any) -> ModelBuilder:
    """The tiny model of the decoding tests, with room for its adapter."""
    config = tiny_config(vocab_size)
    return ModelBuilder(config, tiny_adapter(config).config if adapter else None, "float32", **changes)


def tiny_params(adapter: bool = False, vocab_size: int = 6) -> Flat:
    """Random weights of ``tiny_builder``, those of a random adapter among them."""
    config = tiny_config(vocab_size)
    base = flat_base(init_params(config, jax.random.key(0), jnp.dtype(jnp.float32)))
    return {**base, **flat_adapter(tiny_adapter(config).params)} if adapter else base


def two_streams(
    builder: ModelBuilder, params: Flat, batch: Batch, rows: NoisyRows, block: int, gated: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Logits of the clean and of the noisy rows."""
    model = builder.build(params)
    has_adapter = builder.adapter is not None
    clean_from, noisy_from = 0 if has_adapter and not gated else None, 0 if has_adapter else None
    clean, noisy = two_stream.two_streams(model, batch, rows, block, clean_from, noisy_from)
    return model.logits(clean), model.logits(noisy)


streams = compiled(two_streams, static_argnames=("builder", "block", "gated"))
