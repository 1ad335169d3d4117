#!/usr/bin/env bash
# Scores, tokens a forward and speed of SmolLM2 by AR, ISD and R-ISD, greedy and at temperature 1. Run by hand on one GPU;
# repeat it to go on after an interruption:
#
#     scripts/eval_tasks_smollm2.sh MODEL OUTPUT TASKS [flags of `idlm eval tasks`]
#     scripts/eval_tasks_smollm2.sh models/SmolLM2-135M-Instruct.Q4_1.gguf runs/tasks "gsm8k=test.jsonl humaneval ifeval"
#
# TASKS may be one of the three: several calls with the same OUTPUT share a summary. OUTPUT/gated has AR beside R-ISD, by
# the adapter of the package. OUTPUT/full has AR beside ISD of a model trained as a whole, if FULL names one
# (FULL=runs/smollm2_full/model, made by scripts/train_smollm2.sh).
set -euo pipefail
model=$1 output=$2
read -ra tasks <<<"$3"
shift 3
python="${PYTHON:-python3}"

evaluate() {
    "$python" -m idlm_jax.cli.main eval tasks "$@" --tasks "${tasks[@]}" --temperatures 0 1 --batch-size 128
}

evaluate "$model" --adapter smollm2-n4 --dtype bfloat16 --modes ar r-isd --output "$output/gated" "$@"
[ -z "${FULL:-}" ] || evaluate "$FULL" --dtype bfloat16 --modes ar isd --output "$output/full" "$@"
