#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on a folder of photos with the settings for a machine; started again, it goes on from its last checkpoint.
set -euo pipefail

# name          base  GPUs  precision  flags
SETTINGS='
t4-sd15         sd15  1     fp16       --resolution 512 --gradient_checkpointing
t4-sdxl         sdxl  1     fp16       --resolution 1024 --gradient_checkpointing --use_8bit_adam --anchor_batch_size 1 --skip_final_inference
24gb-sd15       sd15  1     bf16       --resolution 512
24gb-sdxl       sdxl  1     bf16       --resolution 1024 --gradient_checkpointing --anchor_batch_size 1
24gb-sd3        sd3   1     bf16       --resolution 1024 --gradient_checkpointing
two-24gb-sdxl   sdxl  2     bf16       --resolution 1024 --gradient_checkpointing --anchor_batch_size 1
'

usage() {
  echo "usage: launch.sh SETTING PHOTOS CLASS OUTPUT [flags of the trainer, which win]"
  echo "such as: launch.sh t4-sd15 photos/rex dog sap-rex --anchor_weight 0.3"
  echo "SETTING is one of:$SETTINGS"
  exit 2
} >&2

[ $# -ge 4 ] || usage
SETTING=$1 PHOTOS=$2 CLASS=$3 OUTPUT=$4
shift 4
read -r _ BACKBONE GPUS PRECISION FLAGS < <(grep "^$SETTING " <<< "$SETTINGS") || usage

case $BACKBONE in
  sd15) MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 ;;
  sdxl) MODEL=stabilityai/stable-diffusion-xl-base-1.0 ;;
  sd3) MODEL=stabilityai/stable-diffusion-3-medium-diffusers ;;
esac
case $CLASS in
  [AEIOUaeiou]*) A_CLASS="an $CLASS" ;;
  *) A_CLASS="a $CLASS" ;;
esac
START=(python)
if [ "$GPUS" -gt 1 ]; then
  START=(torchrun --standalone --nproc_per_node "$GPUS")
fi
SCRIPT=$(cd "$(dirname "$0")/../.." && pwd)/train_sap_lora_$BACKBONE.py

# shellcheck disable=SC2086  # FLAGS are several words
exec "${START[@]}" "$SCRIPT" --pretrained_model_name_or_path $MODEL --mixed_precision "$PRECISION" \
  --instance_data_dir "$PHOTOS" --instance_prompt "a photo of sks $CLASS" --class_prompt "a photo of $A_CLASS" \
  --output_dir "$OUTPUT" --center_crop --train_batch_size 1 --rank 16 --learning_rate 1e-4 \
  --max_train_steps $((500 / GPUS)) --checkpointing_steps $((100 / GPUS)) --checkpoints_total_limit 2 \
  --resume_from_checkpoint latest --seed 0 $FLAGS "$@"
