# The server on an NVIDIA GPU: policy in vLLM, graphs in ONNX Runtime for CUDA.
#
#   docker build -f containers/cuda.Dockerfile -t coprs-deploy:cuda .
#   docker run --gpus all --shm-size 1g -v "$PWD/bundle:/bundle:ro" coprs-deploy:cuda /bundle
#
# vLLM's own image has the compilers that its kernels need at run time. What it lacks comes by
# number from containers/requirements-cuda.txt; pin the base by digest once it is pulled:
# --build-arg BASE=vllm/vllm-openai:v0.32.0@sha256:...
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}
COPY containers/requirements-cuda.txt /src/containers/
RUN python3 -m pip install --no-cache-dir --no-deps --only-binary :all: \
        --requirement /src/containers/requirements-cuda.txt
COPY pyproject.toml README.md /src/
COPY coprs_deploy /src/coprs_deploy
RUN python3 -m pip install --no-cache-dir --no-deps /src \
    && python3 -c "import coprs_deploy.server.app, onnxruntime, vllm" \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin coprs \
    && install --directory --owner coprs --group coprs /cache
ENV HOME=/tmp \
    COPRS_DEPLOY_CACHE=/cache/coprs-deploy \
    VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    XDG_CACHE_HOME=/cache \
    HF_HUB_OFFLINE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/tmp", "/cache"]
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["coprs-deploy", "serve", "--host", "0.0.0.0", "--policy", "vllm", "--device", "cuda"]
