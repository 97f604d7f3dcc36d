"""Which policies can decode here."""

from __future__ import annotations

import importlib.metadata

from coprs_deploy.engines import Availability

TRANSFORMERS_PACKAGES = ("torch", "transformers", "safetensors")


def availability() -> list[Availability]:
    """Say which policies can run, and the pip line for those that cannot."""
    found, missing = [], []
    for package in TRANSFORMERS_PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        names = " ".join(missing)
        return [
            Availability("transformers", False, f"{names} not installed", f"pip install {names}")
        ]
    return [Availability("transformers", True, ", ".join(found))]
