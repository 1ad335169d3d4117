#!/usr/bin/env bash
# Scores, tokens a forward and speed of SmolLM2 by AR, ISD and R-ISD, greedy and at temperature 1. Run by hand on one GPU;
# repeat it to go on after an interruption:
#
#     scripts/eval_tasks_smollm2.sh MODEL OUTPUT TASKS [flags of `idlm eval tasks`]
#     scripts/eval_tasks_smollm2.sh models/SmolLM2-135M-Instruct.Q4_1.gguf runs/tasks "gsm8k=test.jsonl humaneval ifeval"
#
# TASKS may be one of the three: several calls with the same OUTPUT share summaries. OUTPUT/gated_<dtype> has AR beside
# R-ISD, by the adapter of the package: float32 shows that the texts are AR's, bfloat16 is the speed (DTYPES=bfloat16 for
# that alone). OUTPUT/full_<dtype> has AR beside ISD of a model trained as a whole, where FULL names one
# (FULL=runs/smollm2_full/model, made by scripts/train_smollm2.sh).
set -euo pipefail
model=$1 output=$2
read -ra tasks <<<"$3"
shift 3
python="${PYTHON:-python3}"

evaluate() {
    "$python" -m idlm_jax.cli.main eval tasks "$1" --tasks "${tasks[@]}" --temperatures 0 1 --batch-size 128 "${@:2}"
}

for dtype in ${DTYPES:-float32 bfloat16}; do
    evaluate "$model" --adapter smollm2-n4 --dtype "$dtype" --modes ar r-isd --output "$output/gated_$dtype" "$@"
    [ -z "${FULL:-}" ] || evaluate "$FULL" --dtype "$dtype" --modes ar isd --output "$output/full_$dtype" "$@"
done
