"""CoPRS reasoning segmentation: export, verify and serve.

Importing this package loads no heavy library; names are resolved on first use.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from coprs_deploy.version import __version__

if TYPE_CHECKING:
    from coprs_deploy.errors import (
        CoPRSError,
        ImageError,
        InstructionError,
        PolicyError,
        QueueFullError,
        RequestTimeoutError,
    )
    from coprs_deploy.runtime import (
        CoPRS,
        PriorEvent,
        RuntimeOptions,
        SegmentationResult,
        TextDelta,
        Timings,
    )

__all__ = [
    "CoPRS",
    "CoPRSError",
    "ImageError",
    "InstructionError",
    "PolicyError",
    "PriorEvent",
    "QueueFullError",
    "RequestTimeoutError",
    "RuntimeOptions",
    "SegmentationResult",
    "TextDelta",
    "Timings",
    "__version__",
]

_HOMES = ("coprs_deploy.errors", "coprs_deploy.runtime")
"""Modules of the public names; errors can be imported without the runtime's libraries."""


# ONNX Runtime and OpenVINO report their use to their makers, who read this variable, and do without
# this module.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in map(importlib.import_module, _HOMES):
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
