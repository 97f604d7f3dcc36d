# The server on a CPU: graphs in ONNX Runtime or OpenVINO, policy in OpenVINO, no PyTorch.
#
#   docker build -f containers/cpu.Dockerfile -t coprs-deploy:cpu .
#
# Base image by digest, Python packages by number (containers/requirements-cpu.txt).
ARG BASE=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/coprs
COPY containers/requirements-cpu.txt /src/
RUN /opt/coprs/bin/pip install --no-cache-dir --no-deps --only-binary :all: \
        --requirement /src/requirements-cpu.txt
COPY pyproject.toml README.md /src/
COPY coprs_deploy /src/coprs_deploy
# With openvino-telemetry, each import of OpenVINO is reported to its makers.
RUN /opt/coprs/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && /opt/coprs/bin/pip check \
    && /opt/coprs/bin/pip uninstall --yes openvino-telemetry setuptools pip

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin coprs \
    && install --directory --owner coprs --group coprs /cache
COPY --from=build /opt/coprs /opt/coprs
ENV PATH=/opt/coprs/bin:$PATH \
    HOME=/tmp \
    COPRS_DEPLOY_CACHE=/cache \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The root file system may be read-only; /tmp holds uploads, /cache compiled graphs.
VOLUME ["/tmp", "/cache"]
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["coprs-deploy", "serve", "--host", "0.0.0.0"]
