"""The machine and the installed software: processor, memory, package versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from coprs_deploy.specs import Record

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
"""Packages that affect weights, graphs and image decoding."""

TOOLCHAIN = ("torch", "transformers", "accelerate", "trl", "peft", "numpy", "tokenizers")
"""Packages that affect a training run."""

INT8_UNITS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
"""Instruction sets that accumulate int8 products in 32 bits. Without one, some libraries add two
products in 16 bits first, which may overflow."""


class Processor(Record, frozen=True):
    """Processor of this machine.

    Attributes:
        name: model name; the architecture if the system does not report one.
        units: instruction sets in Linux's names; empty if the system does not report them.
        cores: number of cores that this process may use.
    """

    name: str
    units: tuple[str, ...]
    cores: int

    @property
    def has_int8_units(self) -> bool:
        """Whether int8 matrix products are exact in every runtime."""
        return not INT8_UNITS.isdisjoint(self.units)


def describe_processor() -> Processor:
    """Read the processor's description from ``/proc/cpuinfo`` or the ``platform`` module."""
    described: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        described.setdefault(field.strip(), value.strip())
    return Processor(
        name=described.get("model name") or platform.processor() or platform.machine(),
        units=tuple(described.get("flags", described.get("Features", "")).split()),
        cores=len(os.sched_getaffinity(0)),
    )


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process in bytes.

    Linux's ``VmHWM`` counts this process alone; ``ru_maxrss``, the fallback, may include the
    parent process.
    """
    peak = _kilobytes("/proc/self/status", "VmHWM")
    if peak is not None:
        return 1024 * peak
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def available_memory_bytes() -> int:
    """Return the memory available without swapping, in bytes.

    Caches that the kernel can drop count as available. If the system does not report it, half of
    the physical memory.
    """
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    if available is not None:
        return 1024 * available
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _kilobytes(file: str, field: str) -> int | None:
    """Read a field of a ``/proc`` file; None if the system does not report it."""
    try:
        lines = Path(file).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return found[0] if found else None


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed ones among ``PACKAGES``."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, Any]:
    """Return package versions, machine and commit, for the record of a run."""
    versions = {}
    for package in TOOLCHAIN:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown",
    }
