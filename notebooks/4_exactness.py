# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How strided decoding stays exact
#
# Introspective strided decoding (ISD) drafts several tokens at mask rows and verifies them in the next forward pass.
# Drafts are guesses, yet the text has exactly the distribution of ordinary autoregressive (AR) sampling. This notebook
# shows it on a model so small that the probability of *every* text can be written down: first the rule for one token,
# then whole texts from the real decoder, and at last a rule that looks right and is not. Two minutes on a CPU.

# %% [markdown]
# The next cell installs the package where it is missing, as on a fresh Colab machine (one to three minutes), with the
# JAX of that machine's chip. If Colab asks for a restart afterwards, restart and run the cells again.

# %%
import importlib.util
import subprocess
import sys
from glob import glob

if importlib.util.find_spec("idlm_jax") is None:
    is_tpu = glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")
    chip = "gpu," if glob("/dev/nvidia[0-9]*") else "tpu," if is_tpu else ""
    package = f"idlm-jax[{chip}gguf,train]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %% tags=["parameters"]
SAMPLES = 131_072  # texts drawn from the decoder in each way; a multiple of 4096
STRIDES = (2, 3, 4, 8)

# %%
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from idlm_jax import DecodeConfig, SamplingParams
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import init_params
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.generate import advance, start
from idlm_jax.decoding.sampling import COUPLINGS, Drafts, RatioCoupling

BLUE, GREEN, ORANGE, RED = "#4c72b0", "#2a9d60", "#e08a1e", "#c23b3b"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## One token
#
# The model itself would draw the next token from p; the mask row, which has not seen all of the text, drafted it from
# another distribution q. The rule of speculative sampling, `coupling="ratio"` here:
#
# 1. draw the draft d from q;
# 2. accept it with probability min(1, p(d) / q(d));
# 3. if it is rejected, draw from the positive part of p − q, normalised.
#
# A token is then drawn with probability min(p, q) + max(p − q, 0) = p, whatever q is. A bad q costs acceptance, which
# is Σ min(p, q), never truth.
#
# The official code takes another draft: the argmax of q, but goes on with steps 2 and 3 as if it had been drawn from
# q. The token of the argmax is then proposed more often than q says, and nothing makes up for it. Its result, r below,
# follows from the rule without any sampling:

# %%
p = np.array([0.45, 0.30, 0.15, 0.10])
q = np.array([0.30, 0.15, 0.40, 0.15])

residual = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()
accepted = np.minimum(p, q)  # draft drawn from q, and accepted
ratio = accepted + (1 - accepted.sum()) * residual

d = np.argmax(q)  # always the same draft
chance = min(1, p[d] / q[d])
official = chance * np.eye(len(p))[d] + (1 - chance) * residual

print("p                      ", p)
print("drafts from q          ", ratio, " total variation to p:", round(abs(ratio - p).sum() / 2, 3))
print("argmax of q as if drawn", official, " total variation to p:", round(abs(official - p).sum() / 2, 3))

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
bars = {
    "p, the model": (p, BLUE),
    "q, the draft": (q, "#bbbbbb"),
    "ratio rule": (ratio, GREEN),
    "official rule": (official, RED),
}
for i, (name, (values, color)) in enumerate(bars.items()):
    axis.bar(np.arange(len(p)) + 0.2 * (i - 1.5), values, 0.18, color=color, label=name)
axis.set(xticks=range(len(p)), xticklabels=list("abcd"), xlabel="token", ylabel="probability")
axis.legend()
plt.show()

# %% [markdown]
# The other exact rule, `coupling="gumbel"` (the default), goes further. Noise g belongs to (seed, output position,
# token). The next token is argmax(log p + g), which is a sample of p; the draft is argmax(log q + g) with *the same* g,
# and is accepted if it is that token. What is emitted never depends on the draft at all, so a seed gives one text,
# however it is decoded.
#
# ## Whole texts
#
# A random two-layer model with three letters and a mask token. It has 27 texts of three letters; multiplying the
# probabilities of their tokens gives the exact distribution of AR sampling.

# %%
LETTERS, MASK, LENGTH = "abc", 3, 3
PROMPT = [0, 2, 1]

config = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": len(LETTERS) + 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.25,  # large, so that no two distributions are alike
        "mask_token_id": MASK,
    }
)
model = Qwen3(config, init_params(config, jax.random.key(5), jnp.float32))

texts = np.array(list(itertools.product(range(len(LETTERS)), repeat=LENGTH)))
tokens = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
logits = causal_logits(model, jnp.asarray(tokens))[:, len(PROMPT) - 1 : -1, :MASK]  # the mask is never emitted
log_p = np.asarray(jax.nn.log_softmax(logits))
exact = np.exp(np.take_along_axis(log_p, texts[:, :, None], axis=2).sum(axis=(1, 2)))
names = ["".join(LETTERS[token] for token in text) for text in texts]

print(f"{len(texts)} texts, probabilities add up to {exact.sum():.6f}")
best = np.argsort(-exact)[:3]
print("most likely:", ", ".join(f"{names[i]} {exact[i]:.3f}" for i in best))

# %% [markdown]
# Now samples, from the decoder that also serves large models: stride 3, so two drafts a round, 4096 texts at a time,
# each with a seed of its own. The official rule is the ratio rule with another draft, a few lines.


# %%
@dataclass(frozen=True)
class OfficialCoupling(RatioCoupling):
    """Drafts are the argmax of q, verified as if they had been drawn from q."""

    name: str = "official"

    def draft(self, log_q, key_B, position):
        """The most likely token of every mask row."""
        return Drafts(jnp.argmax(log_q, axis=-1).astype(jnp.int32), log_q)


BATCH = 4096


def sample(policy, count, first_seed=0):
    """Texts of the decoder, [count, LENGTH]."""
    sampling = SamplingParams(temperature=1.0, max_tokens=LENGTH)
    prefilled = start(model, [PROMPT] * BATCH, [sampling] * BATCH, policy)
    batches = []
    for first in range(first_seed, first_seed + count, BATCH):
        state = jax.tree.map(jnp.copy, prefilled)  # decoding reuses the memory of its state
        keys = jax.vmap(jax.random.key)(jnp.arange(first, first + BATCH, dtype=jnp.uint32))
        state = replace(state, filters=replace(state.filters, key=keys))
        batches.append(np.asarray(advance(model, state, LENGTH, policy).tokens[:, :LENGTH]))
    return np.concatenate(batches)


def numbered(samples):
    """The number of every text in the list of all texts."""
    return np.ravel_multi_index(tuple(samples.T), (len(LETTERS),) * LENGTH)


isd = DecodeConfig(stride=3, layout="branch").policy()
ways = {
    "AR": DecodeConfig(stride=1).policy(),
    "ISD, gumbel": replace(isd, coupling=COUPLINGS["gumbel"]),
    "ISD, ratio": replace(isd, coupling=COUPLINGS["ratio"]),
    "ISD, official rule": replace(isd, coupling=OfficialCoupling()),
}
drawn = {name: numbered(sample(policy, SAMPLES)) for name, policy in ways.items()}
shares = {name: np.bincount(numbers, minlength=len(texts)) / SAMPLES for name, numbers in drawn.items()}

# %%
colors = {"AR": BLUE, "ISD, gumbel": GREEN, "ISD, ratio": ORANGE, "ISD, official rule": RED}
markers = {"AR": "s", "ISD, gumbel": "o", "ISD, ratio": "D", "ISD, official rule": "x"}
order = np.argsort(-exact)
figure, axis = plt.subplots(figsize=(10, 3.8), layout="constrained")
axis.bar(range(len(texts)), exact[order], color="#dddddd", label="exact, enumerated")
for i, (name, share) in enumerate(shares.items()):
    x = np.arange(len(texts)) + 0.2 * (i - 1.5)
    axis.plot(x, share[order], markers[name], color=colors[name], markersize=4, label=f"{name}, sampled")
axis.set(
    xticks=range(len(texts)), xticklabels=[names[i] for i in order], ylabel="probability", xlim=(-0.7, len(texts) - 0.3)
)
axis.tick_params(axis="x", rotation=90)
axis.legend(title=f"{SAMPLES:,} texts each")
plt.show()

# %% [markdown]
# AR, gumbel and ratio stand on the bars; the official rule does not. How far may samples of the right distribution
# stray? Total variation (half the sum of the absolute differences) falls with the square root of the number of
# samples. The band holds 98 % of what sampling noise alone gives, simulated from the exact distribution. An exact way
# goes down with it, however long one looks; a wrong one leaves it and levels off at its error.

# %%
counts = np.unique(np.geomspace(256, SAMPLES, 9).astype(int))
rng = np.random.default_rng(0)
noise = [np.abs(rng.multinomial(n, exact / exact.sum(), size=500) / n - exact).sum(axis=1) / 2 for n in counts]
low, high = np.quantile(noise, [0.01, 0.99], axis=1)


def distance(numbers):
    """Total variation between samples and the enumerated distribution."""
    return np.abs(np.bincount(numbers, minlength=len(texts)) / len(numbers) - exact).sum() / 2


figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.fill_between(counts, low, high, color="#dddddd", label="sampling noise, 98 %")
for name, numbers in drawn.items():
    style = {"color": colors[name], "marker": markers[name], "linewidth": 6 if name == "AR" else 1.5}
    axis.plot(counts, [distance(numbers[:n]) for n in counts], markersize=4, label=name, **style)
axis.set(xscale="log", yscale="log", xlabel="texts sampled", ylabel="total variation to the exact distribution")
axis.legend()
plt.show()

for name, numbers in drawn.items():
    total = distance(numbers)
    verdict = "within the noise" if total < high[-1] else "not the same distribution"
    print(f"{name:<20} total variation {total:.4f} (noise up to {high[-1]:.4f}): {verdict}")

# %% [markdown]
# The lines of AR and gumbel are one line, because not only their distributions are equal: text for text they are the
# same samples.
#
# ## One seed, one text
#
# With `gumbel`, neither stride nor layout changes a token:

# %%
reference = sample(ways["AR"], BATCH)
for stride, layout in itertools.product(STRIDES, ("standard", "branch")):
    same = sample(DecodeConfig(stride=stride, layout=layout).policy(), BATCH) == reference
    print(f"N = {stride}, {layout:<8}: {same.all(axis=1).sum()} of {BATCH} texts are AR's")

# %% [markdown]
# ## Where this is tested
#
# The project's tests do the same with temperature, top-k and top-p, with and without an adapter, for strides 2, 3
# and 4 in both layouts, 200,000 samples each (`pytest -m distribution`), and keep the official rule as the example that
# must fail. "Exact" is meant for exact arithmetic: windows of other widths add in another order, and two tokens that
# are nearly tied may change places, in bfloat16 often;
# [docs/measurements.md](../docs/measurements.md) says how often. The README
# sums it up: ["What is exact, and why"](../README.md#what-is-exact-and-why).
