#!/usr/bin/env bash
# Sample the training text of SmolLM2's adapter from SmolLM2 itself: questions and answers at temperature 1, from the
# bare chat prefix. Run by hand on a GPU (30 M tokens on an H100; resumes when it is repeated):
#   scripts/synthesize_smollm2.sh models/SmolLM2-135M-Instruct.Q4_1.gguf data
set -euo pipefail
model=$1 data=$2
idlm="${PYTHON:-python3} -m idlm_jax.cli.main"
sample() { # name, tokens, seed
    [ -d "$data/$1" ] || $idlm data synthesize "$model" --output "$data/$1" --tokens "$2" --seed "$3" \
        --batch-size "${BATCH:-2048}" --max-tokens 1024 --temperature 1 --dtype bfloat16 --resume
}
mkdir -p "$data"
sample smollm2-held-out 1e6 1
sample smollm2-self 30e6 0
