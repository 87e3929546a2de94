#!/usr/bin/env bash
# sbatch --array=0-7 slurm/preencode.sh [CONFIG] [KEY=VALUE …]: pre-encode, the jobs of the array share the shards
#SBATCH --job-name=preencode
#SBATCH --nodes=1
#SBATCH --array=0-3
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
test -r slurm/job.sh || { echo "$PWD: sbatch slurm/preencode.sh in the repository's root" >&2; exit 2; }
source slurm/job.sh
run preencode "${@:-configs/preencode/demo_scenes.yaml}"
