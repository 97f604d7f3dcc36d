"""The machine and the installed software: processor, memory, package versions, commit."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from coprs_deploy.specs import Record
from coprs_deploy.version import __version__

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

MATRIX_UNITS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}
"""Instruction sets that multiply in a dtype; without one, libraries convert to float32 and back."""

INT8_UNITS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
"""Instruction sets that accumulate int8 products in 32 bits. Without one, some libraries add two
products in 16 bits first, which may overflow."""

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""Names of settings in ``malloc.h``."""


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

    def units_for(self, dtype: str) -> tuple[str, ...]:
        """Return the instruction sets that multiply in ``bfloat16`` or ``float16``."""
        return tuple(unit for unit in MATRIX_UNITS[dtype] if unit in self.units)


def describe_processor() -> Processor:
    """Read the processor's description from ``/proc/cpuinfo`` or the ``platform`` module.

    On x86, family and model are part of the name: virtual machines give ``AMD EPYC`` for
    generations that differ in speed by a factor of four.
    """
    described: dict[str, str] = {}
    for line in _system_text("/proc/cpuinfo").splitlines():
        field, _, value = line.partition(":")
        described.setdefault(field.strip(), value.strip())
    name = described.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in described and "model" in described:
        name += f" (family {described['cpu family']}, model {described['model']})"
    return Processor(
        name=name,
        units=tuple(described.get("flags", described.get("Features", "")).split()),
        cores=len(os.sched_getaffinity(0)),
    )


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process in bytes.

    Linux's ``VmHWM`` counts this process alone; ``ru_maxrss``, the fallback, may include the
    parent process.
    """
    status = _system_text("/proc/self/status")
    if peak := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
        return 1024 * int(peak[1])
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def available_memory_bytes() -> int:
    """Return the memory available without swapping, in bytes; caches count as available.

    Inside a container with a memory limit (Linux control groups, version 2), at most what is left
    of the limit.
    """
    available = int(psutil.virtual_memory().available)
    limit = _system_text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal():
        used = int(_system_text("/sys/fs/cgroup/memory.current"))
        statistics = dict(map(str.split, _system_text("/sys/fs/cgroup/memory.stat").splitlines()))
        available = min(available, int(limit) - used + int(statistics.get("inactive_file", 0)))
    return available


def return_freed_blocks() -> None:
    """Have the C library return blocks of 1 MiB and more to the system when they are freed.

    glibc returns large blocks at first, but raises the size from which it does, up to 32 MiB, with
    each larger one that is freed. The smaller ones then stay in pools of the threads, eight for
    each core, whose holes do not fit the images of other sizes. Now the threads also share a pool
    for each core. Another C library is left as it is.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_M_ARENA_MAX, len(os.sched_getaffinity(0)))


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the installed ones among some packages."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


VECTOR_UNITS = (
    "sse4_2",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
"""Instruction sets that decide how fast matrix products are, by the kernel's names."""

KINDS = (("amx_bf16", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon"))
"""Vector units that name the kind of machine, widest first."""


class Machine(Record, frozen=True):
    """Record of the machine that something was measured on.

    Attributes:
        kind: short name for file names, as in ``cpu-2-cores-avx2``.
        processor: product name.
        vector_units: instruction sets that matter for matrix products, narrowest first.
        cores: number of cores that this process may use.
        memory_bytes: memory of the host.
        gpu: name and compute capability; None without a GPU.
        driver: version of the GPU driver.
        system: kernel and architecture.
        versions: versions of Python and of the packages that take part.
        commit: commit of the checkout, with ``-dirty`` when files differ; None outside a checkout.
    """

    kind: str
    processor: str
    vector_units: tuple[str, ...]
    cores: int
    memory_bytes: int
    gpu: str | None
    driver: str | None
    system: str
    versions: dict[str, str]
    commit: str | None


def machine_record(gpu: str | None = None, packages: Sequence[str] = PACKAGES) -> Machine:
    """Describe this machine, the GPU in use (as in ``NVIDIA L4 (sm_89)``) and some packages."""
    processor = describe_processor()
    return Machine(
        kind=_kind(processor, gpu),
        processor=processor.name,
        vector_units=tuple(unit for unit in VECTOR_UNITS if unit in processor.units),
        cores=processor.cores,
        memory_bytes=psutil.virtual_memory().total,
        gpu=gpu,
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={**installed_versions(packages), "coprs-deploy": __version__},
        commit=_checkout(),
    )


def environment() -> dict[str, Any]:
    """Return versions, machine and commit, for the record of a training run."""
    record = machine_record(packages=TOOLCHAIN)
    python = record.versions.pop("python")
    return {
        "versions": record.versions,
        "python": python,
        "machine": f"{platform.machine()}, {record.cores} cores",
        "processor": record.processor,
        "commit": record.commit or "unknown",
    }


def _system_text(path: str) -> str:
    """Read a file of Linux's ``/proc`` or ``/sys``; empty on other systems."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _kind(processor: Processor, gpu: str | None) -> str:
    if gpu is not None:
        return re.sub(r"[^a-z0-9]+", "-", gpu.partition(" (")[0].lower()).strip("-")
    units = (kind for unit, kind in KINDS if unit in processor.units)
    cores = f"{processor.cores}-core{'s' if processor.cores > 1 else ''}"
    return f"cpu-{cores}-{next(units, platform.machine())}"


def _checkout() -> str | None:
    """Return the commit of the checkout that this package runs from."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return None
    return _first_line("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")


def _first_line(*command: str) -> str | None:
    """Return the first line that a program prints; None without the program or on failure."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
