#!/usr/bin/env bash
# Train on a Cloud TPU slice, one process a host; run from a machine with gcloud:
#
#     scripts/launch/tpu_vm.sh my-v5e-16 us-west4-a configs/train/qwen3-8b_gated_lora_r128.yaml /mnt/runs/gated data=/mnt/data/self
#
# NAME ZONE CONFIG OUTPUT [KEY=VALUE …]. Every host needs this package with the extras `tpu` and `train`, and the same
# mounted folder (Filestore, or a bucket by gcsfuse) for model, data and output. Called again, it goes on with the run.
set -euo pipefail
name=$1 zone=$2 config=$3 output=$4
shift 4
command="idlm train $config --output $output --distributed"
for setting in "$@"; do command+=" --set $setting"; done
command+=" \$([ -d $output/checkpoints ] && echo --resume)"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$command"
