#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stable Diffusion 1.5 on a T4 (16 GB, no bfloat16): t4_sd15.sh PHOTOS CLASS OUTPUT
set -euo pipefail
PHOTOS=$1 CLASS=$2 OUTPUT=$3
HERE=$(cd "$(dirname "$0")" && pwd)

accelerate launch --config_file "$HERE/one_gpu_fp16.yaml" "$HERE/../../train_sap_lora_sd15.py" \
  --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --instance_data_dir "$PHOTOS" \
  --instance_prompt "a photo of sks $CLASS" --class_prompt "a photo of a $CLASS" --output_dir "$OUTPUT" \
  --resolution 512 --center_crop --train_batch_size 1 --gradient_checkpointing --rank 8 \
  --learning_rate 1e-4 --max_train_steps 500 --checkpointing_steps 100 --checkpoints_total_limit 2 \
  --resume_from_checkpoint latest --seed 0
