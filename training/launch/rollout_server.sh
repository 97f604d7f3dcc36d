#!/usr/bin/env bash
# Two GPUs write the responses, six train: start this, and when it serves, in another shell
#   CUDA_VISIBLE_DEVICES=0,1,2,3,4,5 accelerate launch --config_file fsdp2_1x8.yaml --num_processes 6 \
#       -m coprs_deploy.cli.main train RECIPE --out OUT \
#       --set phases.grpo.rollout.engine=vllm_server --set phases.grpo.batch_images=18
# (a step's responses must divide evenly: 18 prompts x 8 responses over 6 processes).
#   ./rollout_server.sh POLICY_DIRECTORY
set -euo pipefail
CUDA_VISIBLE_DEVICES=6,7 VLLM_SERVER_DEV_MODE=1 vllm serve "$1" \
    --data-parallel-size 2 \
    --weight-transfer-config '{"backend": "nccl"}' \
    --logprobs-mode processed_logprobs \
    --max-logprobs -1 \
    --max-model-len 3400
