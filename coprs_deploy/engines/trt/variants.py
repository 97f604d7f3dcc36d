"""The two TensorRTs behind one code path: which package each is, and which GPUs it knows.

``tensorrt`` builds on the GPU that will run the engine. ``tensorrt-rtx`` is for RTX cards; it also
builds on a machine without a GPU, for a list of compute capabilities.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coprs_deploy.errors import MissingDependencyError


@dataclass(frozen=True)
class TrtVariant:
    """One of the two libraries.

    Attributes:
        name: as in ``--runtime``.
        module: its Python module.
        title: its name for people.
        install: the pip line that brings it.
        builds_without_gpu: whether ``--gpu`` may name GPUs that are not here.
    """

    name: str
    module: str
    title: str
    install: str
    builds_without_gpu: bool

    def load(self) -> Any:
        """Import the library; it has no types.

        Raises:
            MissingDependencyError: it is not installed, or its shared libraries do not load.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise MissingDependencyError(
                f"{self.title} cannot be imported ({error}); {self.install}"
            ) from error


TENSORRT = TrtVariant(
    name="tensorrt",
    module="tensorrt",
    title="TensorRT",
    install='pip install "coprs-deploy[tensorrt]"',
    builds_without_gpu=False,
)
TENSORRT_RTX = TrtVariant(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    title="TensorRT for RTX",
    install='pip install "coprs-deploy[tensorrt-rtx]"',
    builds_without_gpu=True,
)
TRT_VARIANTS: Mapping[str, TrtVariant] = {
    variant.name: variant for variant in (TENSORRT, TENSORRT_RTX)
}


def known_capabilities(library: Any) -> list[str]:
    """List the compute capabilities that a library builds for without a GPU, as ``sm_89``."""
    members = getattr(library, "ComputeCapability", None)
    names = dir(members) if members is not None else []
    found = [match[1] for name in names if (match := re.fullmatch(r"SM(\d+)", name))]
    return [f"sm_{number}" for number in sorted(found, key=int)]


def check_capabilities(library: Any, variant: TrtVariant, gpus: Sequence[str]) -> None:
    """Refuse GPUs that a library does not build for.

    Raises:
        ValueError: names what is accepted.
    """
    if gpus and not variant.builds_without_gpu:
        raise ValueError(
            f"gpu is {','.join(gpus)}, but {variant.title} builds on the GPU that runs the engine: "
            "leave --gpu out, and export on that machine; --hardware-compatible gives an engine "
            "for every GPU from sm_80 on"
        )
    known = known_capabilities(library)
    unknown = [gpu for gpu in gpus if gpu not in known]
    if unknown:
        raise ValueError(
            f"gpu names {unknown[0]!r}; {variant.title} {library.__version__} builds for "
            f"{', '.join(known)}"
        )


def parse_gpus(text: str | None) -> tuple[str, ...]:
    """Read ``sm_80,sm_89``; None and empty text name no GPU.

    Raises:
        ValueError: a part has another form, or comes twice.
    """
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    for part in parts:
        if not re.fullmatch(r"sm_\d{2,3}", part):
            raise ValueError(f"gpu names {part!r}; accepted: sm_XX,sm_YY as in sm_80,sm_89,sm_120")
    if len(set(parts)) != len(parts):
        raise ValueError(f"gpu names one twice: {text}")
    return tuple(sorted(parts, key=lambda part: int(part[3:])))
