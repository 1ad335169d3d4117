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
# # Train a gated adapter
#
# A model that has never been taught to draft guesses badly at mask rows. A *gated* adapter (a LoRA that acts on mask
# rows alone) teaches it, and cannot change what the model says: the rows that verify are the untouched model's. This
# notebook lets SmolLM2 write its own training text, trains an adapter for a few minutes, and measures acceptance
# before and after. The adapter of the package went through the same steps with a thousand times as many tokens
# ([docs/training.md](../docs/training.md)).

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
TOPICS = ("the sea", "bread", "winter", "music", "a garden", "trains", "the moon", "tea", "cats", "rivers")
SAMPLES_PER_TOPIC = 8
LENGTH = 128  # tokens of a document, and of a row of training
ROWS = 4  # of LENGTH tokens, a step and device
STEPS = 40  # on a GPU or TPU take more of everything: 100 samples a topic, 32 rows, 500 steps
TEST_PROMPT = "Why is the sky blue?"

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import rich

import idlm_jax
from idlm_jax import DecodeConfig, SamplingParams
from idlm_jax.checkpoint.fetch import MODELS, fetch
from idlm_jax.cli.eval_acceptance import acceptance_table
from idlm_jax.cli.render import comparison_table
from idlm_jax.data.synthesize import SynthesisConfig, synthesize
from idlm_jax.evaluation.acceptance import evaluate_store
from idlm_jax.evaluation.equivalence import compare
from idlm_jax.training.config import (
    AdapterSettings,
    CheckpointSettings,
    EvaluationSettings,
    OptimizerSettings,
    Stage,
    TrainConfig,
    validate,
)
from idlm_jax.training.loop import train
from idlm_jax.training.metrics import read_metrics

DTYPE = "float32" if jax.default_backend() == "cpu" else "bfloat16"
gguf = fetch("smollm2", say=print)
mask_token = str(MODELS["smollm2"].mask_token_id)  # a token that text never contains
base = idlm_jax.load(gguf, dtype=DTYPE, mask_token=mask_token)

# %% [markdown]
# ## Text of the model's own
#
# A draft is right if it is what *this* model goes on to say. So the right text to learn from is its own, sampled at the
# temperature at which it will be used. `synthesize` writes it into a token store; on the command line, `idlm data
# synthesize`.

# %%
store = Path("data/notebook")
if not store.exists():
    chats = [[{"role": "user", "content": f"Write about {topic}."}] for topic in TOPICS]
    settings = SynthesisConfig(samples_per_prompt=SAMPLES_PER_TOPIC, max_tokens=LENGTH, batch_size=64)
    written = synthesize(base, store, settings, chats, name="smollm2")
    document = written[0]
    print(base.tokenizer.decode(document.tokens.tolist()))
    print(written.metadata["counts"])

# %% [markdown]
# ## Before
#
# The documents go through the model once, with groups of B = 3 masks at random places of the text. The draft at depth k
# would be accepted with probability Σ min(p, q): p is what the model says there, q what the mask row says.

# %%
HELD_OUT = max(2, len(TOPICS) * SAMPLES_PER_TOPIC // 10)
measured = {"block_size": 3, "documents": HELD_OUT, "length": LENGTH, "batch_size": 2, "dtype": DTYPE}
before, _ = evaluate_store(str(gguf), str(store), mask_token=mask_token, **measured)
rich.print(acceptance_table(before))

# %% [markdown]
# ## Train
#
# Every document goes through the model once, causally; beside it go the mask groups, which see the text before them
# and must predict what follows, exactly as when decoding. Two stages: `kl` brings q near p; `tv`, total variation, is
# one minus acceptance itself, but has little to say while p and q hardly overlap. The same settings as a YAML file are
# what `idlm train` takes.

# %%
config = TrainConfig(
    model=str(gguf),
    data=(str(store),),
    output="runs/notebook",
    mode="gated-lora",
    mask_token=mask_token,
    adapter=AdapterSettings(rank=32),
    stages=(
        Stage(steps=STEPS // 2, block_size=3, noisy_loss="kl"),
        Stage(steps=STEPS - STEPS // 2, block_size=3, noisy_loss="tv"),
    ),
    optimizer=OptimizerSettings(learning_rate=3e-3, beta2=0.99),
    length=LENGTH,
    batch_size=ROWS * jax.device_count(),
    dtype=DTYPE,
    remat="none",
    evaluation=EvaluationSettings(documents=HELD_OUT, every=STEPS),
    checkpoint=CheckpointSettings(every=STEPS),
)
validate(config)
outcome = train(config)
print(f"{outcome.step} steps, adapter in {outcome.result}")

# %%
entries = read_metrics(Path(config.output))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axis, loss, color in zip(axes, ("kl", "tv"), ("#e08a1e", "#2a9d60"), strict=True):
    part = [entry for entry in entries if entry["noisy_loss"] == loss]
    axis.plot([entry["step"] for entry in part], [entry["loss_noisy"] for entry in part], color=color)
    axis.set(title=f"{loss}, mask rows", xlabel="step", ylabel="loss")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The two losses have scales of their own; 1 − `tv` is acceptance, here on the text of a step.
#
# ## After
#
# The same held-out documents, which training never saw:

# %%
after, _ = evaluate_store(str(gguf), str(store), adapter=str(outcome.result), **measured)
rich.print(acceptance_table(after))

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
depths = range(1, 4)
for shift, (label, report, color) in enumerate((("before", before, "#bbbbbb"), ("after", after, "#2a9d60"))):
    shares = report.temperatures[0].by_depth
    bars = axis.bar([depth + 0.4 * shift - 0.2 for depth in depths], shares, 0.38, color=color, label=label)
    axis.bar_label(bars, fmt="%.2f", fontsize=9)
axis.set(xticks=depths, xlabel="depth of the draft", ylabel="acceptance, temperature 1")
axis.margins(y=0.12)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Decode with it
#
# A prompt of another kind than those it was trained on, greedy, at stride 4. The text is that of AR with the base
# model, as the last line of the table says; the adapter changes only how many passes it takes.

# %%
drafting = idlm_jax.load(gguf, adapter=outcome.result, dtype=DTYPE)
sampling = SamplingParams(max_tokens=min(64, LENGTH // 4))
answers = {
    name: compare(model, [model.as_chat(TEST_PROMPT)], sampling, [DecodeConfig(stride=4, layout="branch")])[0]
    for name, model in {"untrained": base, "with the adapter": drafting}.items()
}
for name, answer in answers.items():
    print(name)
    rich.print(comparison_table([answer]))
print(answers["untrained"].reference.text)

# %% [markdown]
# A few minutes on few documents move the drafts a little; the adapter of the package was trained on 96 million tokens.
# To go on: more text and steps, `mode="full"` to train the whole model as the paper does, and the configurations in
# [configs/train](../configs/train). `idlm train CONFIG --dry-run` tells the
# memory beforehand, and a run that was stopped goes on with `--resume`.
