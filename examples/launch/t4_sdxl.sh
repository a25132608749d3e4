#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SDXL on a T4 (16 GB, no bfloat16): t4_sdxl.sh PHOTOS CLASS OUTPUT
set -euo pipefail
PHOTOS=$1 CLASS=$2 OUTPUT=$3
HERE=$(cd "$(dirname "$0")" && pwd)

accelerate launch --config_file "$HERE/one_gpu_fp16.yaml" "$HERE/../../train_sap_lora_sdxl.py" \
  --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir "$PHOTOS" \
  --instance_prompt "a photo of sks $CLASS" --class_prompt "a photo of a $CLASS" --output_dir "$OUTPUT" \
  --resolution 1024 --center_crop --train_batch_size 1 --gradient_checkpointing --use_8bit_adam --rank 8 \
  --anchor_batch_size 1 --learning_rate 1e-4 --max_train_steps 500 --checkpointing_steps 100 \
  --checkpoints_total_limit 2 --resume_from_checkpoint latest --skip_final_inference --seed 0
