"""A flattened model is the model itself in compiled programs, and another of its form needs no new program."""

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.backbone.flat import flat
from idlm_jax.backbone.qwen3 import causal_logits
from tests.decoding.support import tiny_config, tiny_model

TOKENS = jnp.array([[1, 2, 3, 4]])


def test_a_flat_model_gives_the_same_logits_by_one_program_for_all_models_of_its_form() -> None:
    # With a cache of its own.
    program = jax.jit(lambda model, tokens: causal_logits(model, tokens))
    for seed in (0, 1):
        model = tiny_model(adapter=True, seed=seed)
        np.testing.assert_array_equal(program(flat(model), TOKENS), jax.jit(causal_logits)(model, TOKENS))
    assert program._cache_size() == 1
    program(flat(tiny_model(adapter=False)), TOKENS)
    program(flat(tiny_model(tiny_config(tie_word_embeddings=True), adapter=True)), TOKENS)
    assert program._cache_size() == 3
