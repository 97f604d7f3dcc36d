"""What is checked before a plan is deserialized, and the command that mends what does not fit."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cuda import Gpu
from coprs_deploy.engines.runner import RunnerOptions
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, known_capabilities
from coprs_deploy.errors import BundleError, BundleIntegrityError, EngineMismatchError
from coprs_deploy.specs import TensorSpec


def check_loadable(
    name: str, engine: EngineRecord, version: str, gpu: Gpu, options: RunnerOptions
) -> None:
    """Refuse an engine that was not built for this library and this GPU.

    Raises:
        EngineMismatchError: says what was found, what is needed and what mends it.
    """
    title = TRT_VARIANTS[engine.variant].title
    if engine.version_compatible and not options.allow_engine_host_code:
        raise EngineMismatchError(
            f"{name} is a version-compatible plan, which carries code that would run here; if you "
            "trust where the bundle comes from, allow it with --allow-plan-code (in Python: "
            "RuntimeOptions(allow_engine_host_code=True))"
        )
    if not _fits_version(engine, version):
        raise EngineMismatchError(
            f"{name} was built by {title} {engine.version}, and {version} is installed. Install "
            f"that version, or build again: {_command(engine)}"
        )
    here = gpu.compute_capability
    reaches = engine.hardware_compatible and int(here[3:]) >= 80
    if here not in engine.compute_capabilities and not reaches:
        raise EngineMismatchError(
            f"{name} was built for {', '.join(engine.compute_capabilities)}, and this GPU "
            f"({gpu.name}) is {here}. Build it for this GPU: {_command(engine, here)}"
        )


def _fits_version(engine: EngineRecord, version: str) -> bool:
    if version == engine.version:
        return True
    built, here = (_numbers(text) for text in (engine.version, version))
    return engine.version_compatible and built[:1] == here[:1] and here >= built


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _command(engine: EngineRecord, gpu: str | None = None) -> str:
    """Name the command that builds an engine again, for another GPU too if one is given.

    A plan does not know its precision and its range of targets; the manifest does.
    """
    variant, runtime = TRT_VARIANTS[engine.variant], engine.variant
    words = []
    if variant.builds_without_gpu:
        if gpu is not None and gpu not in known_capabilities(variant.load()):
            runtime = "tensorrt"  # the other flavor, on the GPU itself
        else:
            gpus = [*engine.compute_capabilities, *([gpu] if gpu else [])]
            words.append(f"--gpu {','.join(gpus)}")
    if engine.workspace_bytes is not None:
        words.append(f"--workspace {engine.workspace_bytes / 2**30:g}")
    if engine.version_compatible:
        words.append("--version-compatible")
    if engine.hardware_compatible:
        words.append("--hardware-compatible")
    named = " ".join([f"--runtime {runtime}", "--precision PRECISION", *words, "--overwrite"])
    return (
        f"`coprs-deploy export CHECKPOINT --out BUNDLE {named}`, with the precision and --targets "
        "that `coprs-deploy inspect BUNDLE` shows"
    )


def remedy(engine: EngineRecord) -> str:
    """Say how to build an engine again."""
    return f"Build it again: {_command(engine)}"


def read_plan(path: Path, engine: EngineRecord) -> bytes:
    """Read a plan and check the bytes that will be deserialized against the hash.

    Raises:
        BundleIntegrityError: they are not those that were built.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}. {remedy(engine)}") from error
    if len(plan) != engine.size_bytes:
        raise BundleIntegrityError(
            f"{path} has {len(plan)} bytes, not {engine.size_bytes}: it was cut short or changed. "
            f"{remedy(engine)}"
        )
    if hashlib.sha256(plan).hexdigest() != engine.sha256:
        raise BundleIntegrityError(f"{path} was changed (SHA-256 differs). {remedy(engine)}")
    return plan


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
