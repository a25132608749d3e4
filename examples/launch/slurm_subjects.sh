#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A SLURM array with one subject a job, a line "FOLDER<tab>CLASS" of subjects.tsv each:
#     sbatch --array=1-$(wc -l < subjects.tsv) examples/launch/slurm_subjects.sh subjects.tsv OUTPUT
# A job that is stopped (SLURM sends SIGTERM to all that srun started) writes a checkpoint, and goes on from it when it
# is queued again. The trainer is started by python itself: `accelerate launch` would end at once, and SLURM would kill
# the trainer with it, before the checkpoint is written.
#SBATCH --job-name=sap-lora
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
SUBJECTS=$1 OUTPUT=$2
# SLURM runs a copy of this file elsewhere, so paths start where sbatch was called: at the root of the repository.
ROOT=${SLURM_SUBMIT_DIR:-$PWD}
IFS=$'\t' read -r PHOTOS CLASS < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SUBJECTS")

exec srun python "$ROOT/train_sap_lora_sd15.py" --mixed_precision bf16 \
  --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir "$PHOTOS" \
  --instance_prompt "a photo of sks $CLASS" --class_prompt "a photo of a $CLASS" \
  --output_dir "$OUTPUT/$(basename "$PHOTOS")" \
  --resolution 512 --center_crop --train_batch_size 1 --rank 8 --learning_rate 1e-4 --max_train_steps 500 \
  --checkpointing_steps 100 --checkpoints_total_limit 2 --resume_from_checkpoint latest --seed 0
