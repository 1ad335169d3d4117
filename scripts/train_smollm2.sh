#!/usr/bin/env bash
# Train SmolLM2 to draft, and measure what came of it: `gated` makes an adapter, `full` converts the
# whole model by the official curriculum. Run by hand on a GPU of 80 GB, after scripts/synthesize_smollm2.sh; repeat it
# to go on after an interruption:
#
#     scripts/train_smollm2.sh gated models/SmolLM2-135M-Instruct.Q4_1.gguf data runs/smollm2_gated_lora_n4
#     scripts/train_smollm2.sh full models/SmolLM2-135M-Instruct.Q4_1.gguf data runs/smollm2_full
#
# Acceptance on held-out text of each temperature goes to acceptance.txt in the output directory, real decoding to
# drafting_<dtype>.md.
set -euo pipefail
kind=$1 model=$2 data=$3 output=$4
idlm() { "${PYTHON:-python3}" -m idlm_jax.cli.main "$@"; }

case $kind in
    gated)
        config=smollm2_gated_lora_n4 result=$output/adapter trained=("$model" --adapter "$output/adapter") base=()
        stores="[$data/smollm2-self, $data/smollm2-warm, $data/smollm2-greedy]"
        ;;
    full)
        config=smollm2_full result=$output/model trained=("$output/model") base=(--base "$model")
        stores=$data/smollm2-self
        ;;
    *)
        echo "$0: say 'gated' or 'full', not '$kind'" >&2
        exit 2
        ;;
esac
resume=()
[ ! -d "$output/checkpoints" ] || resume=(--resume)
[ -d "$result" ] || idlm train "configs/train/$config.yaml" --model "$model" --data "$stores" --output "$output" \
    "${resume[@]}"
for store in smollm2-held-out smollm2-held-out-warm smollm2-held-out-greedy; do
    echo "$store"
    idlm eval acceptance "${trained[@]}" "$data/$store" "${base[@]}" --temperature 1 --temperature 0.7
done | tee "$output/acceptance.txt"
# float32 shows that texts are AR's, bfloat16 is the speed.
for dtype in float32 bfloat16; do
    "${PYTHON:-python3}" scripts/measure_drafting.py "${trained[@]}" --dtype "$dtype" \
        --json "$output/drafting_$dtype.jsonl" | tee "$output/drafting_$dtype.md"
done
