"""Runtimes, devices, precisions and package versions on this machine."""

from __future__ import annotations

import importlib.metadata

from coprs_deploy.bench.report import Skipped
from coprs_deploy.bundle import TRT_VARIANT_NAMES
from coprs_deploy.engines import openvino_runner, runtime_module, runtime_names
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.export.precision import FP32, INT8


def version_of(*packages: str) -> str:
    """Return the version of the first of these packages that is installed; empty without one."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def runtime_version(runtime: str) -> str:
    """Return the version of a runtime's package; empty where it is not installed."""
    return version_of(*["onnxruntime-gpu"] * (runtime == "onnxruntime"), runtime)


def gpu_name() -> str | None:
    """Name the GPU and its compute capability; None without a GPU."""
    gpu = current_gpu()
    return f"{gpu.name} ({gpu.compute_capability})" if gpu else None


def runtimes_here(
    devices: tuple[str, ...], runtime: str = ""
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """List runtimes that can run graphs here, each with a device, and those that are skipped."""
    present, skipped = [], []
    for name in [runtime] if runtime else runtime_names():
        for entry in runtime_module(name).availability():
            default = "cuda" if name in TRT_VARIANT_NAMES else "cpu"
            device = entry.name.partition(" ")[2] or default
            if not entry.is_available:
                skipped.append(Skipped(entry.name, entry.detail, entry.remedy))
            elif device in devices:
                present.append((name, device))
            else:
                skipped.append(Skipped(entry.name, "the device is not in --device"))
    return present, skipped


def matmul_precisions(runtime: str, precision: str) -> tuple[str, ...]:
    """List the precisions in which a runtime can compute a graph's float32 products here."""
    if runtime != "openvino" or precision not in (FP32, INT8) or not version_of("openvino"):
        return (FP32,)
    return openvino_runner.inference_precisions()


def missing_builders(devices: tuple[str, ...]) -> list[Skipped]:
    """List the TensorRT variants that cannot build engines here."""
    skipped = []
    for name in TRT_VARIANT_NAMES:
        try:
            TRT_VARIANTS[name].load()
            if not TRT_VARIANTS[name].builds_without_gpu and "cuda" not in devices:
                reason = "engines are built on the GPU that runs them, and there is none"
                skipped.append(Skipped(name, reason))
        except MissingDependencyError as error:
            skipped.append(Skipped(name, str(error)))
    return skipped
