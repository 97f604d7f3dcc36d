#!/usr/bin/env bash
# Train on one node with 8 GPUs; re-run the same command to resume.
#   training/launch/one_node.sh grpo_7b runs/grpo_7b [--set KEY=VALUE ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
recipe=$1 out=$2
shift 2
accelerate launch --config_file "$here/fsdp2_1x8.yaml" \
    -m coprs_deploy train "$recipe" --out "$out" "$@"
