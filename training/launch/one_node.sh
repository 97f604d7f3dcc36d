#!/usr/bin/env bash
# The paper's training on one node with 8 GPUs.
#   ./one_node.sh RECIPE OUT [--set KEY=VALUE ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
recipe=$1 out=$2
shift 2
accelerate launch --config_file "$here/fsdp2_1x8.yaml" \
    -m coprs_deploy.cli.main train "$recipe" --out "$out" "$@"
