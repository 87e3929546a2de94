#!/usr/bin/env bash
# sbatch --nodes=2 slurm/train_autoencoder.sh [CONFIG] [KEY=VALUE …]: train an autoencoder, or go on with it
#SBATCH --job-name=train_autoencoder
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
test -r slurm/job.sh || { echo "$PWD: sbatch slurm/train_autoencoder.sh in the repository's root" >&2; exit 2; }
source slurm/job.sh
run train "${@:-configs/autoencoder/demo_scenes.yaml}"
