"""Checks of engines: signature, embedded description, library version, GPU and hash.

Each error names the command that builds a matching engine. Building and loading both use this
module; it deserializes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EngineRecord
from coprs_deploy.engines.cuda import Gpu
from coprs_deploy.engines.runner import RunnerOptions
from coprs_deploy.engines.trt.variants import TRT_VARIANTS, supported_capabilities
from coprs_deploy.errors import BundleError, BundleIntegrityError, EngineMismatchError
from coprs_deploy.specs import GraphSpec, TensorSpec

_DTYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}
"""Names of numpy by those of TensorRT, where they differ by more than the case."""

# The description of the compiled network inside the engine file of TensorRT for RTX.
_HEADER = re.compile(
    rb"\n  inputs=\{(?P<inputs>[^\n]*)\}\n(?:[^\n]*\n){1,4}?  outputs=\{(?P<outputs>[^\n]*)\}\n"
)
_ACCELERATORS = re.compile(rb"\n  accelerators=\{([^\n}]*)\}")
_TENSOR = re.compile(
    rb"tensor=\{[^\n]*? dims=\{([^\n}]*)\}[^\n]*? name=\"([^\n\"]*)\"[^\n]*? type=(\w+) \}"
)


def tensor_spec(name: str, dtype: Any, shape: Sequence[int]) -> TensorSpec:
    """Describe a tensor of the library; dynamic sizes are -1."""
    library_name = dtype.name.lower()
    return TensorSpec(name, _DTYPES.get(library_name, library_name), tuple(shape))


def with_wildcards(tensor: TensorSpec) -> TensorSpec:
    """Replace the symbolic dimension by -1, as the library writes it."""
    shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    return TensorSpec(tensor.name, tensor.dtype, shape)


def signature_mismatch(spec: GraphSpec, found: Sequence[TensorSpec]) -> str | None:
    """Describe how an engine's tensors, in any order, differ from a specification, or None."""
    expected = (*spec.inputs, *spec.outputs)
    if sorted(found, key=str) == sorted(map(with_wildcards, expected), key=str):
        return None
    return (
        f"the engine has {'; '.join(map(str, found))}, "
        f"the manifest says {'; '.join(map(str, expected))}"
    )


@dataclass(frozen=True)
class EngineDescription:
    """A compiled network as its engine file describes it.

    ``types`` is the number of its tensors by element type; dynamic sizes of ``tensors`` are -1.
    """

    tensors: tuple[TensorSpec, ...]
    compute_capabilities: tuple[str, ...]
    types: Mapping[str, int]


def describe_engine(data: Any) -> EngineDescription | None:
    """Read the description in the bytes of an engine file; None if it has none."""
    buffer = memoryview(data)
    header, accelerators = _HEADER.search(buffer), _ACCELERATORS.search(buffer)
    if header is None or accelerators is None:
        return None
    names = re.findall(r'"([^"]*)"', (header["inputs"] + header["outputs"]).decode())
    found: dict[str, TensorSpec] = {}
    types: Counter[str] = Counter()
    for match in _TENSOR.finditer(buffer):
        dims, name, dtype = (group.decode() for group in match.groups())
        dtype = _DTYPES.get(dtype, dtype)
        types[dtype] += 1
        if name in names and name not in found:
            shape = tuple(int(size) if size.isdigit() else -1 for size in dims.split())
            found[name] = TensorSpec(re.sub(r"\.\d+$", "", name), dtype, shape)
    return EngineDescription(
        # Host shape tensors between TensorRT's own parts have a name in braces.
        tensors=tuple(found[name] for name in names if name in found and "{" not in name),
        compute_capabilities=tuple(
            re.sub(r"^sm", "sm_", name) for name in accelerators[1].decode().split()
        ),
        types=dict(types),
    )


def check_loadable(
    name: str, engine: EngineRecord, version: str, gpu: Gpu, options: RunnerOptions
) -> None:
    """Refuse an engine that was not built for the installed library and this GPU.

    Raises:
        EngineMismatchError: states what was found, what is required and how to fix it.
    """
    title = TRT_VARIANTS[engine.variant].title
    if engine.version_compatible and not options.allow_engine_host_code:
        raise EngineMismatchError(
            f"{name} is a version-compatible engine, which carries host code; if you trust the "
            "source of the bundle, allow it with --allow-engine-host-code (in Python: "
            "RuntimeOptions(allow_engine_host_code=True))"
        )
    built, installed = (
        tuple(int(part) for part in text.split(".") if part.isdigit())
        for text in (engine.version, version)
    )
    is_later = engine.version_compatible and built[:1] == installed[:1] and installed >= built
    if version != engine.version and not is_later:
        raise EngineMismatchError(
            f"{name} was built by {title} {engine.version}, and {version} is installed. Install "
            f"that version, or rebuild: {rebuild_command(engine)}"
        )
    capability = gpu.compute_capability
    is_covered = engine.hardware_compatible and int(capability[3:]) >= 80
    if capability not in engine.compute_capabilities and not is_covered:
        raise EngineMismatchError(
            f"{name} was built for {', '.join(engine.compute_capabilities)}, and this GPU "
            f"({gpu.name}) is {capability}. Build it for this GPU: "
            f"{rebuild_command(engine, capability)}"
        )


def rebuild_command(engine: EngineRecord, capability: str | None = None) -> str:
    """Return the export command that rebuilds an engine, for one more GPU if given."""
    variant, runtime = TRT_VARIANTS[engine.variant], engine.variant
    flags = []
    if variant.builds_without_gpu:
        if capability is not None and capability not in supported_capabilities(variant.load()):
            runtime = "tensorrt"  # the other library, on the GPU itself
        else:
            capabilities = [*engine.compute_capabilities, *([capability] if capability else [])]
            flags.append(f"--compute-capabilities {','.join(capabilities)}")
    if engine.workspace_bytes is not None:
        flags.append(f"--workspace {engine.workspace_bytes / 2**30:g}")
    if engine.version_compatible:
        flags.append("--version-compatible")
    if engine.hardware_compatible:
        flags.append("--hardware-compatible")
    named = " ".join([f"--runtime {runtime}", "--precision PRECISION", *flags, "--overwrite"])
    return (
        f"`coprs-deploy export CHECKPOINT --out BUNDLE {named}`, with the precision and --targets "
        "that `coprs-deploy inspect BUNDLE` shows"
    )


def read_engine(path: Path, engine: EngineRecord) -> bytes:
    """Read an engine file; raise :class:`BundleError` unless size and hash are those built."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {error}. Rebuild it: {rebuild_command(engine)}"
        ) from error
    if len(data) != engine.size_bytes:
        raise BundleIntegrityError(
            f"{path} has {len(data)} bytes, not {engine.size_bytes}: it was truncated or changed. "
            f"Rebuild it: {rebuild_command(engine)}"
        )
    if hashlib.sha256(data).hexdigest() != engine.sha256:
        raise BundleIntegrityError(
            f"{path} was changed (SHA-256 differs). Rebuild it: {rebuild_command(engine)}"
        )
    return data
