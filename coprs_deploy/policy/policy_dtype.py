"""Dtype of a policy's weights: the stored one, unless the processor would be slow in it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.machine import (
    MATRIX_UNITS,
    Processor,
    available_memory_bytes,
    describe_processor,
)

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")

MAX_MEMORY_SHARE = 0.9
"""Share of the available memory that float32 weights may take."""


@dataclass(frozen=True)
class PolicyDtype:
    """Dtype in which a policy runs.

    Attributes:
        dtype: torch dtype of the weights; ``auto`` if the configuration does not name one.
        reason: why it was chosen, for messages.
    """

    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})"


def choose_dtype(path: Path, device: str, requested: str | None = None) -> PolicyDtype:
    """Choose the dtype of a policy: the requested one, else the one that suits the device.

    On a CPU, weights in bfloat16 or float16 run in float32 unless the processor multiplies in the
    stored dtype. If float32 does not fit into the available memory, the stored dtype is kept with a
    warning. Quantized policies and GPUs keep the stored dtype.

    Args:
        path: policy directory.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        requested: one of :data:`DTYPES`, or None.

    Raises:
        ValueError: the requested dtype is unknown.
    """
    if requested is not None:
        if requested not in DTYPES:
            raise ValueError(f"dtype is {requested!r}; accepted: {', '.join(DTYPES)} or None")
        return PolicyDtype(requested, "as requested")
    stored = stored_dtype(path)
    processor = describe_processor()
    chosen = cpu_dtype(stored, processor) if device == "cpu" else PolicyDtype(stored, "as stored")
    if chosen.dtype == stored:
        return chosen
    needed = 2 * sum(file.stat().st_size for file in path.glob("*.safetensors"))
    available = available_memory_bytes()
    if needed <= MAX_MEMORY_SHARE * available:
        return chosen
    logger.warning(
        "the policy runs in %s, for which %s has no instructions, and will be slow: float32 needs "
        "%.1f GB, and %.1f GB of memory are available",
        stored,
        processor.name,
        needed / 1e9,
        available / 1e9,
    )
    return PolicyDtype(stored, "as stored; too little memory for float32")


def cpu_dtype(stored: str, processor: Processor) -> PolicyDtype:
    """Return the dtype in which a policy runs on a CPU with enough memory."""
    if stored not in MATRIX_UNITS:
        return PolicyDtype(stored, "as stored")
    if units := processor.units_for(stored):
        return PolicyDtype(stored, f"as stored; the processor has {', '.join(units)}")
    return PolicyDtype(
        "float32", f"stored in {stored}, for which the processor has no instructions"
    )


def stored_dtype(path: Path) -> str:
    """Return the dtype that the configuration of a policy names.

    ``auto`` if it names none, cannot be read (then loading the policy fails, with the reason), or
    is that of a quantized policy.
    """
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "auto"
    if not isinstance(config, dict) or "quantization_config" in config:
        return "auto"
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")
