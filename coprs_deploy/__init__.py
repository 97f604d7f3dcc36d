"""CoPRS reasoning segmentation: export, verify and serve.

Importing this package loads no heavy library; names are resolved on first use.
"""

from __future__ import annotations

import importlib
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

_HOMES = {
    "CoPRS": "coprs_deploy.runtime",
    "CoPRSError": "coprs_deploy.errors",
    "ImageError": "coprs_deploy.errors",
    "InstructionError": "coprs_deploy.errors",
    "PolicyError": "coprs_deploy.errors",
    "PriorEvent": "coprs_deploy.runtime",
    "QueueFullError": "coprs_deploy.errors",
    "RequestTimeoutError": "coprs_deploy.errors",
    "RuntimeOptions": "coprs_deploy.runtime",
    "SegmentationResult": "coprs_deploy.runtime",
    "TextDelta": "coprs_deploy.runtime",
    "Timings": "coprs_deploy.runtime",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
