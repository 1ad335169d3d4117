#!/usr/bin/env bash
# Sample the training text of SmolLM2's adapter from SmolLM2 itself, and as much of other seeds and questions to measure
# on. Run by hand on a GPU of 80 GB; repeat it to go on after an interruption:
#
#     idlm fetch smollm2 && scripts/synthesize_smollm2.sh models/SmolLM2-135M-Instruct.Q4_1.gguf data
#
#   smollm2-self     30 M tokens at temperature 1: the model writes questions and answers from the bare chat prefix
#   smollm2-warm     the same questions answered at temperature 0.7
#   smollm2-greedy   and at temperature 0: decoding meets other contexts at each temperature, so training sees them too
#   smollm2-held-out, -warm, -greedy: to measure on, from questions of their own
#
# The GGUF file names no mask token, and sampling at stride 1 needs none.
set -euo pipefail
model=$1 data=$2
python="${PYTHON:-python3}"
mkdir -p "$data"

sample() { # name, further flags of `idlm data synthesize`
    local name=$1
    shift
    [ -d "$data/$name" ] || "$python" -m idlm_jax.cli.main data synthesize "$model" --output "$data/$name" \
        --batch-size "${BATCH:-4096}" --dtype bfloat16 --resume "$@"
}
questions() { # store, count
    [ -f "$data/$1.jsonl" ] || {
        "$python" scripts/questions_of_store.py "$data/$1" --model "$model" --count "$2" >"$data/$1.part"
        mv "$data/$1.part" "$data/$1.jsonl"
    }
}

sample smollm2-self --tokens 30e6 --seed 0 --max-tokens 512 --temperature 1
questions smollm2-self 20000
sample smollm2-greedy --prompts "$data/smollm2-self.jsonl" --max-tokens 512 --temperature 0
sample smollm2-warm --prompts "$data/smollm2-self.jsonl" --max-tokens 512 --temperature 0.7 --seed 2
sample smollm2-held-out --tokens 1e6 --seed 1 --max-tokens 1024 --temperature 1
questions smollm2-held-out 512
sample smollm2-held-out-greedy --prompts "$data/smollm2-held-out.jsonl" --max-tokens 512 --temperature 0
sample smollm2-held-out-warm --prompts "$data/smollm2-held-out.jsonl" --max-tokens 512 --temperature 0.7 --seed 3
