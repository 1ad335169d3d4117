"""A tiny model whose distribution over texts can be enumerated, and the tests that compare samples with it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from scipy import stats

from idlm_jax.backbone.adapter import Adapter, AdapterConfig, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.sharding import adapter_sharding, weight_sharding
from idlm_jax.backbone.weights import Params, build_params, init_params
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.forward import prepare
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.sampling import COUPLINGS, Coupling, Drafts, RatioCoupling
from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.evaluation.equivalence import draw, drawn_texts, prefill_copies

TEXT_LENGTH = 4
PROMPT = [1, 3, 0]


def tiny_config(vocab_size: int = 6, **changes: object) -> ModelConfig:
    """A two-layer Qwen3 whose last token is the mask, with weights large enough for distinct distributions."""
    hf = {
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.35,
        "mask_token_id": vocab_size - 1,
        **changes,
    }
    return ModelConfig.from_hf(hf)


def tiny_adapter(config: ModelConfig, seed: int = 7, b_scale: float = 0.5) -> Adapter:
    """A random adapter on every projection, with a mask embedding."""
    settings = AdapterConfig(rank=4, alpha=8)
    adapter = init_adapter(config, settings, jax.random.key(seed), jnp.float32, b_scale)
    embedding = jax.random.normal(jax.random.key(seed + 1), (config.hidden_size,))
    return Adapter(settings, {**adapter.params, "mask_embedding": embedding})


def tiny_model(config: ModelConfig | None = None, adapter: bool = False, seed: int = 0) -> Qwen3:
    """A random tiny model in float32."""
    config = config or tiny_config()
    params = init_params(config, jax.random.key(seed), jnp.float32)
    return Qwen3(config, params, tiny_adapter(config) if adapter else None)


def laid_out(config: ModelConfig, params: Params, adapter: Adapter | None, mesh: Mesh) -> Qwen3:
    """A model whose weights, and those of its adapter, lie over a mesh by the rules, as ``load`` prepares it."""
    params = jax.device_put(params, build_params(config, weight_sharding(mesh)))
    if adapter is not None:
        adapter = Adapter(adapter.config, jax.device_put(adapter.params, adapter_sharding(config, adapter, mesh)))
    with jax.set_mesh(mesh):
        return Qwen3(config, *prepare(config, params, adapter))


@dataclass(frozen=True)
class OfficialCoupling(RatioCoupling):
    """The official code's rule (method.md 3.7): drafts are the argmax of q, verified as if they were drawn from q."""

    name: str = "official"

    def draft(
        self, log_q: Float[Array, "B drafts V"], key_B: Key[Array, " B"], position: Int[Array, "B drafts"]
    ) -> Drafts:
        return Drafts(jnp.argmax(log_q, axis=-1).astype(jnp.int32), log_q)


@dataclass(frozen=True)
class Cell:
    """One way to decode."""

    stride: int
    layout: str
    coupling: str
    temperature: float
    top_k: int
    top_p: float
    adapter: bool

    @property
    def policy(self) -> Policy:
        return Policy(self.stride, LAYOUTS[self.layout], COUPLINGS[self.coupling])

    @property
    def name(self) -> str:
        filters = f"T{self.temperature}-k{self.top_k}-p{self.top_p}"
        return f"N{self.stride}-{self.layout}-{self.coupling}-{filters}-{'lora' if self.adapter else 'base'}"


FACTORS = ((2, 3, 4), ("standard", "branch"), ("gumbel", "ratio"), (0.7, 1.0, 1.3), (0, 3), (1.0, 0.8), (False, True))
ALL_CELLS = [Cell(*levels) for levels in itertools.product(*FACTORS)]


def pairwise_cells() -> list[Cell]:
    """A small set of cells in which every pair of levels of any two factors occurs (greedy)."""

    def pairs(levels: tuple) -> set:
        return set(itertools.combinations(enumerate(levels), 2))

    candidates = list(itertools.product(*FACTORS))
    missing = set().union(*map(pairs, candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda levels: len(pairs(levels) & missing))
        missing -= pairs(best)
        chosen.append(Cell(*best))
    return chosen


def filtered_probabilities(logits: np.ndarray, cell: Cell, banned: int) -> np.ndarray:
    """Naive filters on one row: mask token out, temperature, sort for top-k, sort again for top-p."""
    logits = logits.astype(np.float64) / cell.temperature
    logits[banned] = -np.inf
    order = np.argsort(-logits)
    if cell.top_k:
        logits[order[cell.top_k :]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= cell.top_p]] = 0
    return p / p.sum()


def enumerate_texts(model: Qwen3, cell: Cell) -> np.ndarray:
    """Exact AR probability of every text of TEXT_LENGTH tokens, an array with one axis a token."""
    vocab, banned = model.config.vocab_size, model.config.mask_token_id
    assert banned is not None
    texts = np.array(list(itertools.product(range(vocab), repeat=TEXT_LENGTH - 1)))
    tokens = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
    logits = np.asarray(jax.jit(causal_logits)(model, jnp.asarray(tokens)))[:, len(PROMPT) - 1 :]
    shape = (vocab,) * TEXT_LENGTH
    probability = np.ones(shape)
    rows = logits.reshape(*shape[:-1], TEXT_LENGTH, vocab)
    for depth in range(TEXT_LENGTH):
        axis = np.zeros(shape[: depth + 1])
        for prefix in np.ndindex(*shape[:depth]):
            row = rows[prefix + (0,) * (TEXT_LENGTH - 1 - depth)][depth]
            axis[prefix] = filtered_probabilities(row.copy(), cell, banned)
        probability *= axis.reshape(axis.shape + (1,) * (TEXT_LENGTH - 1 - depth))
    return probability


def sample_texts(
    model: Qwen3, cell: Cell, count: int, coupling: Coupling | None = None, first_seed: int = 0, batch: int = 4096
) -> Iterator[np.ndarray]:
    """Batches of texts from the decoder itself, each request with a seed of its own."""
    policy = cell.policy if coupling is None else replace(cell.policy, coupling=coupling)
    sampling = SamplingParams(cell.temperature, cell.top_k, cell.top_p, max_tokens=TEXT_LENGTH)
    prefilled = prefill_copies(model, [PROMPT], [sampling], policy, batch)
    for first in range(first_seed, first_seed + count, batch):
        yield drawn_texts(draw(model, prefilled, first, policy, TEXT_LENGTH), TEXT_LENGTH)


@dataclass(frozen=True)
class Fit:
    """How well samples fit a distribution."""

    samples: int
    total_variation: float
    # Mean and standard deviation of the total variation that sampling noise alone gives.
    noise_mean: float
    noise_std: float
    chi_square_p: float

    @property
    def excess(self) -> float:
        """Total variation above the noise, in standard errors of the noise."""
        return (self.total_variation - self.noise_mean) / self.noise_std

    @property
    def good(self) -> bool:
        return self.excess < 3 and self.chi_square_p > 1e-3


def fit(texts: Iterator[np.ndarray], probability: np.ndarray) -> Fit:
    """Compare sampled texts with their exact distribution: total variation and chi-square."""
    counts = np.zeros(probability.size)
    for batch in texts:
        counts += np.bincount(np.ravel_multi_index(tuple(batch.T), probability.shape), minlength=probability.size)
    expected = probability.ravel()
    samples = int(counts.sum())
    rng = np.random.default_rng(0)
    noise = np.abs(rng.multinomial(samples, expected / expected.sum(), size=200) / samples - expected).sum(axis=1) / 2
    if counts[expected == 0].any():
        chi_square_p = 0.0  # an impossible text was drawn
    else:
        pooled = samples * expected < 5
        seen = np.append(counts[~pooled], counts[pooled].sum())
        wanted = np.append(samples * expected[~pooled], samples * expected[pooled].sum())
        keep = wanted > 0
        chi_square_p = float(stats.chisquare(seen[keep], wanted[keep] * seen[keep].sum() / wanted[keep].sum()).pvalue)
    total_variation = float(np.abs(counts / samples - expected).sum() / 2)
    return Fit(samples, total_variation, float(noise.mean()), float(noise.std()), chi_square_p)


def fit_and_confirm(model: Qwen3, cell: Cell, samples: int) -> list[Fit]:
    """One fit, and where it is bad a second one on four times as many samples of fresh seeds.

    For sweeps over hundreds of cells, where chance alone gives some p below 0.001: a fault shows again, more clearly.
    """
    probability = enumerate_texts(model, cell)
    fits = [fit(sample_texts(model, cell, samples), probability)]
    if not fits[0].good:
        fits.append(fit(sample_texts(model, cell, 4 * samples, first_seed=20_000_000), probability))
    return fits
