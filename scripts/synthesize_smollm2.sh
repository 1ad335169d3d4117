#!/usr/bin/env bash
# Sample the training text of SmolLM2's adapter from SmolLM2 itself, and as much of other seeds and questions to measure
# on. Run by hand on a GPU of 80 GB; repeat it to go on after an interruption:
#
#     idlm fetch smollm2 && scripts/synthesize_smollm2.sh models/SmolLM2-135M-Instruct.Q4_1.gguf data [STORE ...]
#
#   smollm2-self     30 M tokens at temperature 1: the model writes questions and answers from the bare chat prefix
#   smollm2-warm     the same questions answered at temperature 0.7
#   smollm2-greedy   and at temperature 0: decoding meets other contexts at each temperature, so training sees them too
#   smollm2-held-out, -warm, -greedy: to measure on, from questions of their own
#
# Without names it samples all of them, in this order. The answers need the questions of the store before them; apart
# from that stores can be sampled side by side on several GPUs (CUDA_VISIBLE_DEVICES). The GGUF file names no mask
# token, and sampling at stride 1 needs none.
set -euo pipefail
model=$1 data=$2
shift 2
python="${PYTHON:-python3}"
mkdir -p "$data"

sample() { # name, further flags of `idlm data synthesize`
    local name=$1
    shift
    [ -d "$data/$name" ] || "$python" -m idlm_jax.cli.main data synthesize "$model" --output "$data/$name" \
        --batch-size "${BATCH:-4096}" --dtype bfloat16 --resume "$@"
}
answers() { # name, store that the questions come from, how many, further flags
    local name=$1 questions="$data/$1.questions.jsonl"
    [ -f "$questions" ] || {
        "$python" scripts/questions_of_store.py "$data/$2" --model "$model" --count "$3" >"$questions.part"
        mv "$questions.part" "$questions"
    }
    shift 3
    sample "$name" --prompts "$questions" --max-tokens 512 "$@"
}

[ $# -gt 0 ] || set -- smollm2-self smollm2-warm smollm2-greedy \
    smollm2-held-out smollm2-held-out-warm smollm2-held-out-greedy
for store in "$@"; do
    case $store in
    smollm2-self) sample "$store" --tokens 30e6 --seed 0 --max-tokens 512 --temperature 1 ;;
    smollm2-warm) answers "$store" smollm2-self 20000 --temperature 0.7 --seed 2 ;;
    smollm2-greedy) answers "$store" smollm2-self 20000 --temperature 0 ;;
    smollm2-held-out) sample "$store" --tokens 1e6 --seed 1 --max-tokens 1024 --temperature 1 ;;
    smollm2-held-out-warm) answers "$store" smollm2-held-out 512 --temperature 0.7 --seed 3 ;;
    smollm2-held-out-greedy) answers "$store" smollm2-held-out 512 --temperature 0 ;;
    *)
        echo "unknown store '$store'" >&2
        exit 2
        ;;
    esac
done
