"""CoPRS, deployed: reasoning segmentation through exported graphs.

Importing this package loads no heavy library; names resolve when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from coprs_deploy.version import __version__

if TYPE_CHECKING:
    from coprs_deploy.errors import CoPRSError
    from coprs_deploy.runtime import CoPRS, PriorEvent, SegmentationResult, TextDelta

__all__ = ["CoPRS", "CoPRSError", "PriorEvent", "SegmentationResult", "TextDelta", "__version__"]

_HOMES = {
    "SegmentationResult": "coprs_deploy.runtime",
    "CoPRS": "coprs_deploy.runtime",
    "CoPRSError": "coprs_deploy.errors",
    "PriorEvent": "coprs_deploy.runtime",
    "TextDelta": "coprs_deploy.runtime",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
