"""Export one module to one ONNX file, and check the file.

The graph is static except for the number of targets or images, if that has a profile. The
equivalence check is in :mod:`coprs_deploy.export.equivalence`.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coprs_deploy.errors import EquivalenceError, import_failure, install_hint
from coprs_deploy.specs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import torch

OPSET = 20
"""The newest opset that TensorRT 10.3 (JetPack 6) parses; it has LayerNormalization and Gelu."""

METADATA_PREFIX = "coprs_deploy."
"""Prefix of this package's metadata keys in an ONNX file."""

EXTERNAL_DATA_BYTES = 2_000_000_000
"""Weights above this size go into a ``.data`` file; protobuf allows at most 2 GiB."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which PyTorch's exporter records the modules of a node."""

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Metadata key of a node's source lines. They contain paths of the machine and are removed, so
that one checkpoint gives the same bytes everywhere."""

INSTALL = install_hint("export")


def export_onnx_graph(
    module: torch.nn.Module,
    spec: GraphSpec,
    path: Path,
    metadata: Mapping[str, str],
    opset: int = OPSET,
) -> None:
    """Write a float32 module on the CPU as ONNX and check the file.

    It takes and returns the tensors of ``spec`` in order. Large weights go to ``<path>.data``.
    ``metadata`` is stored in the file under ``coprs_deploy.*``.

    Raises:
        MissingDependencyError: the exporter's packages are not installed.
        EquivalenceError: the written graph has other inputs or outputs than ``spec``.
    """
    import torch

    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise import_failure(error, "onnxscript", INSTALL) from error
    dynamic = None
    if not spec.profile.is_static:
        (name,) = {size for t in spec.inputs for size in t.shape if isinstance(size, str)}
        counted = torch.export.Dim(name, min=spec.profile.min, max=spec.profile.max)
        dynamic = tuple(
            {i: counted for i, size in enumerate(tensor.shape) if size == name}
            for tensor in spec.inputs
        )
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            # torch.export would treat 0 or 1 as constants
            example_inputs(spec, max(2, spec.profile.min)),
            dynamo=True,
            opset_version=opset,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    program.model.graph.name = spec.name
    program.model.producer_name = "coprs_deploy"
    for key, value in metadata.items():
        program.model.metadata_props[f"{METADATA_PREFIX}{key}"] = value
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop(STACK_TRACE, None)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    program.save(path, external_data=weights > EXTERNAL_DATA_BYTES)
    for initializer in program.model.graph.initializers.values():
        initializer.const_value = None  # PyTorch keeps the graph alive; free its weights
    del program
    check_onnx_graph(path, spec)


def check_onnx_graph(path: Path, spec: GraphSpec) -> None:
    """Run the ONNX checker on a file, and compare its inputs and outputs with ``spec``.

    Raises:
        EquivalenceError: the file is not valid ONNX, or its signature differs.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise EquivalenceError(f"{path.name} is not valid ONNX: {error}") from error
    graph = onnx.load(path, load_external_data=False).graph
    for kind, found, wanted in (
        ("inputs", graph.input, spec.inputs),
        ("outputs", graph.output, spec.outputs),
    ):
        written = tuple(_tensor_spec(value) for value in found)
        if written != wanted:
            raise EquivalenceError(
                f"{path.name} has the {kind} {'; '.join(map(str, written))}, "
                f"not {'; '.join(map(str, wanted))}"
            )


def module_of(scopes: str | None) -> str:
    """Return the name of a node's module, such as ``blocks.0.attn.qkv``.

    ``scopes`` is its metadata under :data:`SCOPES`: names of the modules around it, then its own.
    """
    names = ast.literal_eval(scopes or "[]")
    return str(names[-2]) if len(names) > 1 else ""


def _tensor_spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(d.dim_param if d.dim_param else d.dim_value for d in tensor.shape.dim)
    return TensorSpec(value.name, dtype, shape)


def example_inputs(spec: GraphSpec, count: int) -> tuple[torch.Tensor, ...]:
    """Return zeros of the inputs' shapes and dtypes, for a number of targets or images."""
    import torch

    return tuple(
        torch.zeros(t.shape_for(count), dtype=getattr(torch, t.dtype)) for t in spec.inputs
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's notes about packages and constant folding."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
