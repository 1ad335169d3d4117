#!/usr/bin/env bash
# Sample the training text of SmolLM2's adapter from SmolLM2 itself: questions and answers at temperature 1, written
# from the bare chat prefix; and a million tokens more, of another seed, to measure on. Run by hand on a GPU of 80 GB;
# repeat it to go on after an interruption:
#
#     idlm fetch smollm2 && scripts/synthesize_smollm2.sh models/SmolLM2-135M-Instruct.Q4_1.gguf data
#
# The GGUF file names no mask token, and sampling at stride 1 needs none.
set -euo pipefail
model=$1 data=$2
mkdir -p "$data"
sample() { # name, sampled tokens, seed, longest document
    [ -d "$data/$1" ] || "${PYTHON:-python3}" -m idlm_jax.cli.main data synthesize "$model" --output "$data/$1" \
        --tokens "$2" --seed "$3" --max-tokens "$4" --batch-size "${BATCH:-4096}" --temperature 1 --dtype bfloat16 --resume
}
sample smollm2-self 30e6 0 512
sample smollm2-held-out 1e6 1 1024
