"""The two TensorRT libraries behind one code path, and the compute capabilities each supports.

``tensorrt`` builds on the GPU that will run the engine. ``tensorrt-rtx`` is for RTX cards; it also
builds on a machine without a GPU, for a list of compute capabilities.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coprs_deploy.errors import import_failure, install_hint


@dataclass(frozen=True)
class TrtVariant:
    """One of the two TensorRT libraries; the name is also the extra that installs it."""

    name: str
    title: str
    builds_without_gpu: bool

    def load(self) -> Any:
        """Import the library; it has no type annotations.

        Raises:
            MissingDependencyError: it is not installed, or its shared libraries do not load.
        """
        module, remedy = self.name.replace("-", "_"), install_hint(self.name)
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise import_failure(error, module, remedy, title=self.title) from error


TENSORRT = TrtVariant("tensorrt", "TensorRT", builds_without_gpu=False)
TENSORRT_RTX = TrtVariant("tensorrt-rtx", "TensorRT for RTX", builds_without_gpu=True)
TRT_VARIANTS: Mapping[str, TrtVariant] = {v.name: v for v in (TENSORRT, TENSORRT_RTX)}


def supported_capabilities(library: Any) -> list[str]:
    """List the compute capabilities that a library builds for without a GPU, as ``sm_89``."""
    members = getattr(library, "ComputeCapability", None)
    found = [match[1] for name in dir(members) if (match := re.fullmatch(r"SM(\d+)", name))]
    return [f"sm_{number}" for number in sorted(found, key=int)]


def check_capabilities(library: Any, variant: TrtVariant, capabilities: Sequence[str]) -> None:
    """Refuse compute capabilities that a library does not build for.

    Raises:
        ValueError: the variant takes no list, or the library does not support one of them.
    """
    if capabilities and not variant.builds_without_gpu:
        raise ValueError(
            f"compute_capabilities is {','.join(capabilities)}, but {variant.title} builds on the "
            "GPU that runs the engine: omit --compute-capabilities and export on that machine; "
            "--hardware-compatible builds an engine for every GPU from sm_80 on"
        )
    supported = supported_capabilities(library)
    unknown = [capability for capability in capabilities if capability not in supported]
    if unknown:
        raise ValueError(
            f"compute_capabilities contains {unknown[0]!r}; {variant.title} {library.__version__} "
            f"builds for {', '.join(supported)}"
        )


def parse_capabilities(text: str | None) -> tuple[str, ...]:
    """Parse ``sm_80,sm_89`` into sorted compute capabilities; None and "" give an empty tuple.

    Raises:
        ValueError: a part has another form, or occurs twice.
    """
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for part in parts:
        if not re.fullmatch(r"sm_\d{2,3}", part):
            raise ValueError(
                f"compute_capabilities contains {part!r}; accepted: sm_XX,sm_YY as in "
                "sm_80,sm_89,sm_120"
            )
    if len(set(parts)) != len(parts):
        raise ValueError(f"compute_capabilities contains a duplicate: {text}")
    return tuple(sorted(parts, key=lambda part: int(part[3:])))


def make_logger(library: Any) -> Any:
    """Create a logger that collects error messages and prints nothing; ``str`` joins the last."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def __str__(self) -> str:
            return "; ".join(self.errors[-3:]) or "no reason given"

    return Logger()
