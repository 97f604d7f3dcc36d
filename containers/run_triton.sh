#!/bin/sh
# Serve a model repository in NVIDIA's Triton container. NEVER RUN: no Triton was at hand.
#
#   coprs-deploy export checkpoint --out bundle --triton models
#   containers/run_triton.sh models            # with a GPU: GPUS=all containers/run_triton.sh models
set -eu
models=$(realpath "${1:?usage: containers/run_triton.sh MODELS}")
root=$(realpath "$(dirname "$0")/..")
docker build -f "$root/containers/triton.Dockerfile" -t coprs-deploy:triton "$root"
exec docker run --rm ${GPUS:+--gpus "$GPUS"} --read-only --tmpfs /tmp --shm-size 1g \
    --cap-drop ALL --security-opt no-new-privileges \
    -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -p 127.0.0.1:8002:8002 \
    -v "$models:/models:ro" coprs-deploy:triton
