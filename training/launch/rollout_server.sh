#!/usr/bin/env bash
# Sample with vLLM on two GPUs and train on six. Start the server:
#   training/launch/rollout_server.sh POLICY_DIRECTORY
# When it is up, train in another shell:
#   CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 accelerate launch \
#       --config_file training/launch/fsdp2_1x8.yaml --num_processes 6 \
#       -m coprs_deploy train grpo_7b --out OUT --set stages.grpo.use_vllm=true \
#       --set stages.grpo.vllm_mode=server --set stages.grpo.global_batch_size=18
# (the 18 prompts x 8 completions of a step must be divisible by the 6 processes).
set -euo pipefail
CUDA_VISIBLE_DEVICES=6,7 VLLM_SERVER_DEV_MODE=1 vllm serve "$1" \
    --data-parallel-size 2 \
    --weight-transfer-config '{"backend": "nccl"}' \
    --logprobs-mode processed_logprobs \
    --max-logprobs -1 \
    --max-model-len 3400
