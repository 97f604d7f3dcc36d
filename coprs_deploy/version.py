"""Versions: of this package, and of those that shape what it makes; nothing is imported for it."""

from __future__ import annotations

import importlib.metadata
import platform

__version__ = "0.1.0"

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "pillow",
)
"""What weights, graphs and pixels depend on."""


def installed_versions() -> dict[str, str]:
    """Name the versions of Python and of these packages, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
