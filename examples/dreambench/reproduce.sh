#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Print the commands for a table or figure of the paper, for all of DreamBench or for the tiny world; a shell runs them:
#     bash reproduce.sh sd15 table1
#     bash reproduce.sh --tiny sd3 figure5 | bash -e
# They start in this folder, and what is done is not done twice. DATA, MODEL, STEPS and SUBJECTS can be set before.
set -euo pipefail

usage() {
  echo "usage: reproduce.sh [--tiny] sd15|sdxl|sd3 table1|table2|figure2|figure3|figure4|figure5|figure6|figure7|figure8"
  exit 2
} >&2

say() { # a command on a line, its words quoted where a shell would split them
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./=:,{}~-]*) line+="\"$word\" " ;;
      *) line+="$word " ;;
    esac
  done
  echo "${line% }"
}

TINY=""
if [ "${1-}" = --tiny ]; then
  TINY=1
  shift
fi
[ $# -eq 2 ] || usage
BACKBONE=$1 ITEM=$2
START=(accelerate launch)
SCORING=()
PICTURES=()
case $BACKBONE in
  sd15) MODEL=${MODEL-stable-diffusion-v1-5/stable-diffusion-v1-5} FLAGS=(--resolution 512 --mixed_precision bf16) ;;
  sdxl) MODEL=${MODEL-stabilityai/stable-diffusion-xl-base-1.0} FLAGS=(--resolution 1024 --mixed_precision bf16) ;;
  sd3) MODEL=${MODEL-stabilityai/stable-diffusion-3-medium-diffusers} FLAGS=(--resolution 1024 --mixed_precision bf16) ;;
  *) usage ;;
esac
FLAGS+=(--train_batch_size 1 --gradient_checkpointing --rank 16 --learning_rate 1e-4 --max_train_steps "${STEPS-500}")
SUBJECT=dog CLASS=dog
DATA=${DATA-dreambooth/dataset}
if [ -n "$TINY" ]; then
  WORLD=../tiny_world
  MODEL=$WORLD/$BACKBONE DATA=$WORLD/dataset SUBJECT=ball CLASS=ball
  STEPS=${STEPS-400} SUBJECTS=${SUBJECTS-ball fish}
  FLAGS=(--resolution 64 --train_batch_size 4 --rank 16 --learning_rate 2e-3 --max_train_steps "$STEPS")
  START=(python)
  SCORING=(--clip_model "$WORLD/clip" --dino_model "$WORLD/vit")
  PICTURES=(--prompts 0 3 5 --images 1 --num_inference_steps 20 --guidance_scale 3)
fi
FLAGS+=(--report_to none --skip_final_inference)
[ "$BACKBONE" != sd3 ] || PICTURES+=(--max_sequence_length 77)
RESOLUTION=${FLAGS[1]}
read -r -a CHOSEN <<< "${SUBJECTS:+--subjects $SUBJECTS}"

train() { # more flags of train_subjects.py
  say python train_subjects.py --backbone "$BACKBONE" --pretrained_model_name_or_path "$MODEL" --data_dir "$DATA" \
    --output_dir loras "${CHOSEN[@]}" "$@" -- "${FLAGS[@]}"
}

draw() { # METHOD, its run or "", tags, more flags of generate.py
  local method=$BACKBONE-$1 run=$2 tags=$3
  shift 3
  local loras=()
  [ -z "$run" ] || loras=(--loras "loras/$BACKBONE-$run-seed0/{subject}")
  local words
  read -r -a words <<< "backbone=$BACKBONE $tags"
  say "${START[@]}" generate.py --pretrained_model_name_or_path "$MODEL" --data_dir "$DATA" --images_dir images \
    --method "$method" "${loras[@]}" --tags "${words[@]}" "${CHOSEN[@]}" "${PICTURES[@]}" "$@"
}

weights() { # train and draw some anchor weights
  train --weights "$@"
  local w
  for w in "$@"; do
    draw "w$w" "w$w-pretrained" "w=$w anchor=pretrained seed=0"
  done
}

prior() {
  local flags=()
  [ -z "$TINY" ] || flags=(--num_class_images 2 --sampling_steps 5 --guidance_scale 3)
  FLAGS+=("${flags[@]}")
  train --method prior
}

score() {
  say "${START[@]}" evaluate.py --data_dir "$DATA" --images_dir images --output_dir results "${SCORING[@]}"
}

drift() { # runs as LABEL=RUN
  local run runs=()
  for run in "$@"; do
    runs+=(--run "${run%=*}=loras/$BACKBONE-${run##*=}-seed0/$SUBJECT")
  done
  say python ../analysis/drift.py --pretrained_model_name_or_path "$MODEL" --instance_data_dir "$DATA/$SUBJECT" \
    --instance_prompt "a photo of sks $CLASS" --class_prompt "a photo of a $CLASS" --resolution "$RESOLUTION" \
    "${runs[@]}" --final_step "${STEPS-500}" --output_dir "drift-$BACKBONE"
}

beyond() { # Beyond-Finetuning sampling of plain DreamBooth; no settings were published for SD3
  local settings=()
  [ "$BACKBONE" != sd3 ] || settings=(--guidance_scale 7 --switch_step 7)
  draw beyond w0-pretrained "" --sampler switching "${settings[@]}"
}

case $ITEM in
  table1 | figure3)
    weights 0 0.5
    prior
    draw prior prior ""
    ;;
  table2 | figure4)
    weights 0 0.5
    beyond
    ;;
  figure2)
    train --weights 0 0.5
    prior
    drift "w = 0=w0-pretrained" "w = 0.5=w0.5-pretrained" "prior preservation=prior"
    ;;
  figure5 | figure7)
    weights 0 0.25 0.5 0.75 1
    ;;
  figure6)
    weights 0 0.5
    train --weights 0.5 --anchor_sources finetuned
    draw w0.5-finetuned w0.5-finetuned "w=0.5 anchor=finetuned seed=0"
    ;;
  figure8)
    train --weights 0 0.5
    drift "w = 0=w0-pretrained" "w = 0.5=w0.5-pretrained"
    ;;
  *) usage ;;
esac
case $ITEM in
  table*)
    score
    say python table.py results/scores.json --group_by backbone --intervals
    ;;
  figure[347])
    score
    say python report.py results/scores.json --data_dir "$DATA" --images_dir images
    ;;
  figure[56])
    score
    say python ../analysis/tradeoff.py --scores results/scores.json --output_dir tradeoff
    ;;
esac
