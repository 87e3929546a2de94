#!/usr/bin/env bash
# sbatch slurm/evaluate.sh RUN [KEY=VALUE …] [--OPTION …]: judge each snapshot of RUN as it appears
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
test -r slurm/job.sh || { echo "$PWD: sbatch slurm/evaluate.sh in the repository's root" >&2; exit 2; }
source slurm/job.sh
run evaluate --watch "$@"
