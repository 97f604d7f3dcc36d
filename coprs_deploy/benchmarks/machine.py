"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import coprs_deploy
from coprs_deploy.benchmarks.report import Machine
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.machine import describe_processor, installed_versions
from coprs_deploy.version import __version__

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
"""Instruction sets that decide how fast matrix products are, as the kernel names them."""

QUESTION_TYPES = (("amx_bf16", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon"))
"""The widest of them names the kind of machine."""


def describe_machine() -> dict[str, str]:
    """Name processor, cores, memory, system and version of this package."""
    processor = describe_processor()
    return {
        "processor": processor.name,
        "cores": str(processor.cores),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "coprs-deploy": __version__,
    }


def machine_record() -> Machine:
    """Say what figures are measured on, for a report."""
    processor = describe_processor()
    gpu = current_gpu()
    versions = {**installed_versions(), "coprs-deploy": __version__}
    return Machine(
        kind=_kind(processor.cores, processor.units, gpu.name if gpu else None),
        processor=processor.name,
        vector_units=tuple(unit for unit in VECTOR_UNITS if unit in processor.units),
        cores=processor.cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=f"{gpu.name} ({gpu.compute_capability})" if gpu else None,
        driver=_printed(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
        commit=_commit(),
    )


def _kind(cores: int, flags: Iterable[str], gpu: str | None) -> str:
    if gpu is not None:
        return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    unit = next((kind for flag, kind in QUESTION_TYPES if flag in flags), platform.machine())
    return f"cpu-{cores}-core{'s' if cores > 1 else ''}-{unit}"


def _commit() -> str | None:
    """Name the commit of the checkout that this package runs from."""
    root = Path(coprs_deploy.__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return None
    return _printed(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])


def _printed(command: Sequence[str]) -> str | None:
    """Give the first line that a program prints; None where there is none."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
