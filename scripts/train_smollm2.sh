#!/usr/bin/env bash
# Train SmolLM2 to draft by a recipe of configs/train, and measure what came of it. Run by hand on one or several GPUs of
# 80 GB, after scripts/synthesize_smollm2.sh; repeat it to go on after an interruption:
#
#     scripts/train_smollm2.sh RECIPE models/SmolLM2-135M-Instruct.Q4_1.gguf data runs/RECIPE [flags of `idlm train`]
#
#   smollm2_gated_lora_n4     an adapter that leaves the model as it is
#   smollm2_full              the whole model, by the official curriculum
#   smollm2_full_random_tv    the whole model, with random group starts and total variation
#
# Acceptance on held-out text of each temperature goes to acceptance.txt in the output directory, an adapter's real
# decoding to drafting_<dtype>.md.
set -euo pipefail
recipe=$1 model=$2 data=$3 output=$4
shift 4
python="${PYTHON:-python3}"
idlm() { "$python" -m idlm_jax.cli.main "$@"; }

case $recipe in
smollm2_gated_lora_n4)
    result=$output/adapter trained=("$model" --adapter "$output/adapter") base=()
    stores="[$data/smollm2-self, $data/smollm2-warm, $data/smollm2-greedy]"
    ;;
smollm2_full | smollm2_full_random_tv)
    result=$output/model trained=("$output/model") base=(--base "$model")
    stores=$data/smollm2-self
    ;;
*)
    echo "$0: unknown recipe '$recipe'" >&2
    exit 2
    ;;
esac
resume=()
[ ! -d "$output/checkpoints" ] || resume=(--resume)
[ -d "$result" ] || idlm train "configs/train/$recipe.yaml" --model "$model" --data "$stores" --output "$output" \
    "${resume[@]}" "$@"
for store in smollm2-held-out smollm2-held-out-warm smollm2-held-out-greedy; do
    echo "$store"
    idlm eval acceptance "${trained[@]}" "$data/$store" "${base[@]}" --temperature 1 --temperature 0.7
done | tee "$output/acceptance.txt"
[ "$recipe" = smollm2_gated_lora_n4 ] || exit 0
# float32 shows that texts are AR's, bfloat16 is the speed.
for dtype in float32 bfloat16; do
    "$python" scripts/measure_drafting.py "${trained[@]}" --dtype "$dtype" \
        --json "$output/drafting_$dtype.jsonl" | tee "$output/drafting_$dtype.md"
done
