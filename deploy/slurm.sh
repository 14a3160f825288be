#!/bin/bash
# A run on two machines of a SLURM cluster: sbatch deploy/slurm.sh configs/sft.yaml [section.key=value ...]
# From the project's root, with the environment of the project active; training.output_dir on shared storage.
#SBATCH --job-name=glm4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180            # three minutes before the time is up: the step ends, a checkpoint is written
#SBATCH --requeue                    # preempted, it begins again and goes on from that checkpoint
#SBATCH --output=slurm-%j.log
set -euo pipefail

export MASTER OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun bash -c 'exec torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${GPUS:-8}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER:${PORT:-29400}" \
    finetune.py "$@"' finetune "$@"
