# NVIDIA's Triton Inference Server with this package, for the Python model of a model repository
# that `coprs-deploy export --triton` wrote. containers/run_triton.sh builds and starts it.
ARG BASE=nvcr.io/nvidia/tritonserver:26.06-py3
FROM ${BASE}
COPY containers/requirements-triton.txt /src/containers/
RUN python3 -m pip install --no-cache-dir --no-deps --only-binary :all: --break-system-packages \
        --requirement /src/containers/requirements-triton.txt
COPY pyproject.toml README.md /src/
COPY coprs_deploy /src/coprs_deploy
RUN python3 -m pip install --no-cache-dir --no-deps --break-system-packages /src \
    && python3 -c "import coprs_deploy.runtime.python_backend"
USER triton-server
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository", "/models"]
