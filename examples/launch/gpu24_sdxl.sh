#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SDXL on a GPU of 24 GB with bfloat16 (RTX 3090, 4090, A5000, L4): gpu24_sdxl.sh PHOTOS CLASS OUTPUT
set -euo pipefail
PHOTOS=$1 CLASS=$2 OUTPUT=$3
HERE=$(cd "$(dirname "$0")" && pwd)

accelerate launch --config_file "$HERE/one_gpu_bf16.yaml" "$HERE/../../train_sap_lora_sdxl.py" \
  --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir "$PHOTOS" \
  --instance_prompt "a photo of sks $CLASS" --class_prompt "a photo of a $CLASS" --output_dir "$OUTPUT" \
  --resolution 1024 --center_crop --train_batch_size 1 --gradient_checkpointing --rank 16 \
  --learning_rate 1e-4 --max_train_steps 500 --checkpointing_steps 100 --checkpoints_total_limit 2 \
  --resume_from_checkpoint latest --validation_prompt "a photo of sks $CLASS in the snow" --seed 0
