#!/usr/bin/env bash
# sbatch --nodes=2 slurm/train_mmdit.sh [CONFIG] [KEY=VALUE …]: train an MM-DiT, or go on with it
#SBATCH --job-name=train_mmdit
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
test -r slurm/job.sh || { echo "$PWD: sbatch slurm/train_mmdit.sh in the repository's root" >&2; exit 2; }
source slurm/job.sh
run train "${@:-configs/train/demo_scenes.yaml}"
