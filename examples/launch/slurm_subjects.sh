#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A SLURM array with one subject a job, a line "FOLDER<tab>CLASS" of subjects.tsv each:
#     sbatch --array=1-$(wc -l < subjects.tsv) examples/launch/slurm_subjects.sh subjects.tsv 24gb-sd15 OUTPUT
# A job that is stopped (SLURM sends SIGTERM to all that srun started) writes a checkpoint, and goes on from it when it
# is queued again. launch.sh becomes the trainer itself: `accelerate launch` would end at once, and SLURM would kill
# the trainer with it, before the checkpoint is written.
#SBATCH --job-name=sap-lora
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: slurm_subjects.sh SUBJECTS.tsv SETTING OUTPUT [flags of the trainer]; launch.sh lists the settings" >&2
  exit 2
fi
SUBJECTS=$1 SETTING=$2 OUTPUT=$3
shift 3
# SLURM runs a copy of this file elsewhere, so paths start where sbatch was called: at the root of the repository.
ROOT=${SLURM_SUBMIT_DIR:-$PWD}
IFS=$'\t' read -r PHOTOS CLASS < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SUBJECTS")

exec srun bash "$ROOT/examples/launch/launch.sh" "$SETTING" "$PHOTOS" "$CLASS" "$OUTPUT/$(basename "$PHOTOS")" "$@"
