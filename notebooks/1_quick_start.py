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
# # Quick start: several tokens a forward pass, the same text
#
# A language model usually writes one token a forward pass. Introspective strided decoding (ISD) appends a few mask
# tokens to the text; the same pass then verifies the tokens drafted before and drafts the next ones. Here a real
# model, SmolLM2-135M-Instruct, answers a question both ways, and every draft is shown in the colour of its fate. Two
# minutes on two CPU cores.

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
PROMPT = "What is a neural network?"
MAX_TOKENS = 64
STRIDE = 4  # N: up to N tokens a forward pass, N - 1 of them drafts

# %% [markdown]
# ## Fetch and convert
#
# SmolLM2 comes as a 4-bit GGUF file of 98 MB, checked by its SHA-256. `write_orbax` makes it a checkpoint that names
# its mask token; on the command line these are `idlm fetch smollm2` and `idlm convert`, which also takes Hugging Face
# directories and Hub ids such as `Qwen/Qwen3-0.6B`. In float32 the comparison below is free of ties.

# %%
from pathlib import Path

import numpy as np
import rich
from rich.table import Table
from rich.text import Text

import idlm_jax
from idlm_jax import DecodeConfig, SamplingParams
from idlm_jax.checkpoint.fetch import MODELS, fetch
from idlm_jax.checkpoint.open import open_source
from idlm_jax.checkpoint.source import parse_dtype
from idlm_jax.checkpoint.store import write_orbax
from idlm_jax.cli.render import ACCEPTED_DRAFT, comparison_table
from idlm_jax.decoding.generate import Decoding
from idlm_jax.evaluation.equivalence import compare

checkpoint = Path("models/smollm2")
if not checkpoint.exists():
    gguf = fetch("smollm2", say=print)
    write_orbax(open_source(gguf), checkpoint, parse_dtype("float32"), MODELS["smollm2"].mask_token_id)

# The adapter taught SmolLM2 to draft; it acts on mask rows alone and comes with the package.
model = idlm_jax.load(checkpoint, adapter="smollm2-n4")
chat = model.as_chat(PROMPT)
print(f"{model.config.num_hidden_layers} layers of {model.config.hidden_size}, {model.model.dtype}")

# %% [markdown]
# ## AR and ISD
#
# Greedy, by AR and by ISD in both layouts of the window: `standard` is the paper's; `branch` appends a group of masks
# to every draft, so that the right next drafts exist whichever drafts are rejected. The first call of a kind compiles.

# %%
sampling = SamplingParams(max_tokens=MAX_TOKENS)
ways = [DecodeConfig(stride=STRIDE, layout=layout) for layout in ("branch", "standard")]
greedy = compare(model, [chat], sampling, ways)[0]
print(greedy.reference.text)
rich.print(comparison_table([greedy]))

# %% [markdown]
# The last line of the table is the point: token for token the text of AR, from fewer forward passes. Fewer passes save
# time where a pass costs about the same whether it holds one row or sixteen, which is so while reading the weights
# takes most of it (large models, small batches, GPUs and TPUs); on a CPU the extra rows cost time.
#
# The same holds for sampled text, since drafts and tokens share their random numbers:

# %%
warm = SamplingParams(temperature=0.8, top_p=0.95, seed=6, max_tokens=MAX_TOKENS)
sampled = compare(model, [chat], warm, ways)[0]
print(sampled.reference.text)
rich.print(comparison_table([sampled]))

# %% [markdown]
# ## The fate of every draft
#
# One round at a time: what was drafted, what of it the next pass accepted (green), what it rejected (red, struck
# out), and the token that the model itself put after the accepted ones (plain). What is not struck out is the answer.

# %%
decoding = Decoding(model.model, [model.encode(chat)], [sampling], ways[0].policy())
shown, rounds, seen, done = Text(), Table("round", "drafts", "accepted", "emitted"), 0, False


def words(tokens):
    """Tokens as text, also when they are a part of a word."""
    return model.tokenizer.decode(list(tokens))


while not done:
    drafts = np.asarray(decoding.state.drafts.tokens[0])
    emission = decoding.run(1)[0]
    new, outcome, done = emission.tokens[seen:], int(emission.history[-1]), emission.done
    accepted, seen = max(outcome, 0), len(emission.tokens)
    shown.append(words(new[:accepted]), style=ACCEPTED_DRAFT)
    if outcome >= 0:  # the first round has nothing to verify
        shown.append(words(drafts[accepted:]), style="red strike")
    shown.append(words(new[accepted:]))
    if len(emission.history) <= 10:
        proposed = " ".join(repr(words([token])) for token in drafts) if outcome >= 0 else "none yet"
        rounds.add_row(str(len(emission.history)), proposed, str(accepted), repr(words(new)))

rich.print(rounds)
rich.print(shown)

# %% [markdown]
# ## In your own program
#
# `generate` answers a batch, `stream` yields pieces as they are committed and says which were drafts.

# %%
for piece in model.stream(chat, sampling, stride=STRIDE):
    if isinstance(piece, idlm_jax.Generation):
        print(f"\n\n{piece.stats.tokens_per_forward:.2f} tokens a forward, ended by {piece.finish_reason}")
    else:
        print(piece.text, end="")

# %% [markdown]
# Next: [train such an adapter](2_train_adapter.ipynb), [spread
# training over several devices](3_sharding.ipynb), or see [why
# the text cannot differ](4_exactness.ipynb). At a shell, `idlm
# chat models/smollm2 --adapter smollm2-n4 --show-drafts` colours drafts as you talk; `idlm --help` lists the rest.
