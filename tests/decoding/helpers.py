"""What the decoding tests share: a model whose drafts are often right, batches of fixed shape, and AR done naively."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from idlm_jax.backbone.adapter import Adapter
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import Params, init_params
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.admission import Request
from idlm_jax.decoding.cache import BIN, Cache
from idlm_jax.decoding.generate import Emission, SamplingParams, generate_tokens
from idlm_jax.decoding.sampling import COUPLINGS
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS
from tests.decoding.support import tiny_adapter, tiny_config

VOCAB = 64
MASK = VOCAB - 1
# Every batch holds a prompt of LONGEST tokens that asks for MOST, so that all of them run the same compiled program.
LONGEST, MOST = 20, 40

full_forward = jax.jit(causal_logits, static_argnums=2)


def drafting_config() -> ModelConfig:
    return tiny_config(vocab_size=VOCAB)


def drafting_adapter(b_scale: float = 0.1) -> Adapter:
    """An adapter that moves the drafts of ``drafting_model`` without ruining them."""
    adapter = tiny_adapter(drafting_config(), b_scale=b_scale)
    return Adapter(adapter.config, {**adapter.params, "mask_embedding": 0.05 * adapter.params["mask_embedding"]})


def drafting_params(seed: int = 0, mask_head: float = 1.0) -> Params:
    """Random weights whose drafts are right about half of the time, so that every number of acceptances occurs.

    What a row says comes from a broad look at the prefix (large attention outputs, flat attention) more than from the
    token it holds; a mask row, which misses only the last few tokens, therefore often says the same. ``mask_head``
    scales what the head says about the mask token.
    """
    params = init_params(drafting_config(), jax.random.key(seed), jnp.float32)
    params["embed_tokens"]["embedding"] *= 0.1
    for layer in params["layers"]:
        layer["self_attn"]["o_proj"]["kernel"] *= 3
        layer["self_attn"]["q_norm"]["scale"] *= 0.3
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, MASK].multiply(mask_head)
    return params


def drafting_model(adapter: Adapter | None = None, seed: int = 0, mask_head: float = 1.0) -> Qwen3:
    """The model of ``drafting_params``."""
    return Qwen3(drafting_config(), drafting_params(seed, mask_head), adapter)


def make_policy(stride: int, layout: str = "branch", coupling: str = "gumbel", gated: bool = True) -> Policy:
    return Policy(stride, LAYOUTS[layout], COUPLINGS[coupling], gated)


AR = make_policy(1)


def random_prompts(count: int, seed: int = 0, longest: int = LONGEST) -> list[list[int]]:
    """Prompts of unequal lengths, the first of one token and the last of ``longest``."""
    rng = np.random.default_rng(seed)
    lengths = [1, *rng.integers(1, longest + 1, count - 2), longest][-count:]
    return [rng.integers(0, MASK, length).tolist() for length in lengths]


def texts(emissions: Sequence[Emission]) -> list[list[int]]:
    return [emission.tokens.tolist() for emission in emissions]


def decode(
    model: Qwen3, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams], policy: Policy, batch: int = 32
) -> list[Emission]:
    """``generate_tokens`` in batches of one shape: ``batch`` requests, the last of which sets the sizes."""
    filler, size = [MASK - 1] * LONGEST, batch - 1
    results = []
    for i in range(0, len(prompts), size):
        part = [*prompts[i : i + size]]
        spare = batch - len(part)
        params = [*sampling[i : i + size], *[SamplingParams(max_tokens=MOST)] * spare]
        results += generate_tokens(model, part + [filler] * spare, params, policy)[: len(part)]
    return results


def naive_ar(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    count: int,
    choose: Callable[[int, int, np.ndarray], int] = lambda request, position, logits: int(np.argmax(logits)),
    adapter_from: int | None = None,
) -> list[list[int]]:
    """AR without a cache: a full forward a token; ``choose`` picks from the logits of (request, output position)."""
    rows = np.zeros((len(prompts), LONGEST + MOST), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    for position in range(count):
        logits = np.array(full_forward(model, jnp.asarray(rows), adapter_from))
        logits[:, :, MASK] = -np.inf
        for request, prompt in enumerate(prompts):
            at = len(prompt) + position
            rows[request, at] = choose(request, position, logits[request, at - 1])
    return [row[len(prompt) : len(prompt) + count].tolist() for row, prompt in zip(rows, prompts, strict=True)]


@cache
def greedy_texts() -> tuple[list[list[int]], list[list[int]]]:
    """31 prompts, and MOST greedy tokens of each by naive AR of ``drafting_model``."""
    prompts = random_prompts(31)
    return prompts, naive_ar(drafting_model(), prompts, MOST)


def requests_of_all_kinds(count: int = 31) -> list[Request]:
    """Greedy and sampled, filtered or not, short and long, with end tokens or without; some prompts occur twice."""
    prompts = random_prompts(count, seed=3)
    prompts[5] = prompts[4]
    prompts[count - 2] = prompts[2]
    kinds = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 7, 1.0), (1.0, 0, 0.9))
    rng = np.random.default_rng(4)
    requests = []
    for i, prompt in enumerate(prompts):
        temperature, top_k, top_p = kinds[i % len(kinds)]
        ends = tuple(rng.integers(0, MASK, i % 3).tolist())
        most = int(rng.integers(1, MOST + 1))
        requests.append(Request(i, prompt, SamplingParams(temperature, top_k, top_p, 100 + i, most, (), ends)))
    return requests


@cache
def alone(policy: Policy) -> list[tuple[list[int], list[int]]]:
    """The texts of ``requests_of_all_kinds`` by one static batch, and how many drafts each round accepted."""
    requests = requests_of_all_kinds()
    prompts, sampling = [r.prompt for r in requests], [r.sampling for r in requests]
    run = decode(drafting_model(drafting_adapter()), prompts, sampling, policy)
    return [(emission.tokens.tolist(), emission.history.tolist()) for emission in run]


def copied_to_pages(pages: Cache, dense: Cache, table: np.ndarray) -> Cache:
    """Keys and values of a dense cache in the pages of each request, slot by slot."""

    def copy(old: jax.Array, new: jax.Array) -> jax.Array:
        stored, rows = np.array(old), np.asarray(new)
        page = stored.shape[2]
        for request, numbers in enumerate(np.asarray(table)):
            for slot in range(min(len(numbers) * page, rows.shape[2])):
                if numbers[slot // page] != BIN:
                    stored[numbers[slot // page], :, slot % page] = rows[request, :, slot]
        return jax.device_put(stored, old.sharding)

    return jax.tree.map(copy, pages, dense)
