#!/usr/bin/env bash
# One run on several hosts. Start the same line on each of them:
#   HEAD=10.0.0.1 HOSTS=2 GPUS=8 examples/cluster/torchrun.sh configs/code_alpaca_mbpp.yaml
# HEAD: a host that all others reach. The output folder must be shared by all hosts.
# A host that fails or is taken away makes all of them begin again at the last checkpoint.
set -euo pipefail
config=$1
shift
exec torchrun --nnodes="${HOSTS:-2}" --nproc-per-node="${GPUS:-8}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29500}" --rdzv-id="${JOB:-dylora}" \
  run.py train --config "$config" --train.parallel ddp \
  --train.gradient_accumulation_steps "$((${HOSTS:-2} * ${GPUS:-8}))" \
  --resume_from_checkpoint auto "$@"
