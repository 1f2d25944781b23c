#!/usr/bin/env bash
# One run on two hosts of eight GPUs: sbatch examples/cluster/slurm.sh configs/code_alpaca_mbpp.yaml
# Two minutes before its time is over the job saves; --requeue starts it again after a preemption.
#SBATCH --job-name=dylora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export HEAD HOSTS=$SLURM_JOB_NUM_NODES GPUS=${SLURM_GPUS_ON_NODE:-8} JOB=$SLURM_JOB_ID
exec srun examples/cluster/torchrun.sh "$@"
