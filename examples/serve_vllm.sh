#!/usr/bin/env bash
# Serves a base model to `rollout="vllm"`, with room for both roles' adapters:
#   bash examples/serve_vllm.sh Qwen/Qwen2.5-VL-3B-Instruct --port 8000 --max-lora-rank 16 --dtype bfloat16
# and then, where the training's environment is, on another GPU:
#   accelerate launch --config_file accelerate_configs/single_gpu.yaml examples/train_qwen.py \
#       --config examples/configs/qwen2_5_vl_3b_vllm.yaml --image_dir images/train --output_dir charts-evolmm
# What comes after the model is passed to `vllm serve`. docs/vllm.md says what each option is for.
set -euo pipefail
model=${1:?"usage: $0 MODEL [OPTION ...]"}
shift
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
exec ${VLLM_SERVE:-vllm serve} "$model" \
  --limit-mm-per-prompt '{"image": 1, "video": 0}' \
  --logprobs-mode processed_logprobs \
  --enable-scale-out \
  --api-server-count 1 \
  --enable-lora --max-loras 2 --max-cpu-loras 4 --max-lora-rank 64 \
  "$@"
