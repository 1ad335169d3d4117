#!/bin/sh
# Samples the training text of the SmolLM2 adapter from SmolLM2 itself: 30 million tokens at temperature 1, questions
# and answers, printed speed included. Run by hand on a GPU with 80 GB (`idlm fetch smollm2` first):
#
#     scripts/synthesize_smollm2.sh [TARGET] [further flags of idlm data synthesize, such as --resume]
#
# The cache of 2048 documents takes 29 GB. The GGUF file names no mask token, and sampling at stride 1 needs none.
set -eu
target=${1:-data/smollm2-free}
[ $# -eq 0 ] || shift
exec python -m idlm_jax.cli.main data synthesize models/SmolLM2-135M-Instruct.Q4_1.gguf --output "$target" \
    --tokens 30e6 --max-tokens 1024 --batch-size 2048 --dtype bfloat16 --seed 0 "$@"
