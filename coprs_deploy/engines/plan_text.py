"""What a plan of TensorRT for RTX says of itself, read without a GPU.

Deserializing an engine takes a GPU. The plans of version 1.7, though, hold a description of the
compiled network as text: its tensors with types and sizes, and the GPUs that it was compiled for.
Nothing documents that text, so a plan without it is no error: its tensors are then compared when
the engine is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coprs_deploy.specs import TensorSpec

_HEADER = re.compile(
    rb"\n  inputs=\{(?P<inputs>[^\n]*)\}\n(?:[^\n]*\n){1,4}?  outputs=\{(?P<outputs>[^\n]*)\}\n"
)
_ACCELERATORS = re.compile(rb"\n  accelerators=\{([^\n}]*)\}")
_TENSOR = re.compile(
    rb"tensor=\{[^\n]*? dims=\{([^\n}]*)\}[^\n]*? name=\"([^\n\"]*)\"[^\n]*? type=(\w+) \}"
)
_TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class PlanText:
    """A compiled network as its plan describes it.

    Attributes:
        tensors: inputs and outputs; a size that is chosen at run time is -1.
        capabilities: the GPUs that it was compiled for, as ``sm_89``.
        types: how many tensors of the compiled network have each element type.
    """

    tensors: tuple[TensorSpec, ...]
    capabilities: tuple[str, ...]
    types: Mapping[str, int]


def read_plan_text(plan: Any) -> PlanText | None:
    """Read the description in a plan; None where there is none.

    Args:
        plan: bytes, or a buffer of them.
    """
    buffer = memoryview(plan)
    header, accelerators = _HEADER.search(buffer), _ACCELERATORS.search(buffer)
    if header is None or accelerators is None:
        return None
    names = re.findall(r'"([^"]*)"', (header["inputs"] + header["outputs"]).decode())
    found: dict[str, TensorSpec] = {}
    types: Counter[str] = Counter()
    for match in _TENSOR.finditer(buffer):
        dims, name, kind = (group.decode() for group in match.groups())
        kind = _TYPES.get(kind, kind)
        types[kind] += 1
        if name in names and name not in found:
            shape = tuple(int(size) if size.isdigit() else -1 for size in dims.split())
            found[name] = TensorSpec(re.sub(r"\.\d+$", "", name), kind, shape)
    return PlanText(
        # What TensorRT passes between its own parts, as shapes on the host, has a name in braces.
        tensors=tuple(found[name] for name in names if name in found and "{" not in name),
        capabilities=tuple(
            re.sub(r"^sm", "sm_", name) for name in accelerators[1].decode().split()
        ),
        types=dict(types),
    )
