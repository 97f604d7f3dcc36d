"""A stage of the model to an ONNX file of some precision; what lies in between is removed again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.engines.cache import Cache
from coprs_deploy.engines.trt.build import BuildCallbacks
from coprs_deploy.engines.trt.cache import hash_graph
from coprs_deploy.export.calibration import (
    Calibrated,
    CalibrationImages,
    cached_ranges,
    calibrate,
)
from coprs_deploy.export.onnx_graph import export_onnx_graph
from coprs_deploy.export.precision import FP32, INT8, OPSETS, type_graph
from coprs_deploy.export.quantization import product_names, quantize_graph
from coprs_deploy.specs import Geometry, GraphSpec

if TYPE_CHECKING:
    import torch


def write_graph(
    module: torch.nn.Module,
    spec: GraphSpec,
    path: Path,
    metadata: Mapping[str, str],
    *,
    precision: str,
    scratch: Path,
) -> None:
    """Write a stage as ONNX in a precision; the float32 graph in between is removed again."""
    if precision == FP32:
        export_onnx_graph(module, spec, path, metadata, OPSETS[precision])
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        float32 = Path(folder) / path.name
        export_onnx_graph(module, spec, float32, metadata, OPSETS[precision])
        type_graph(float32, path, spec, precision)


def write_int8_graph(
    module: torch.nn.Module,
    spec: GraphSpec,
    path: Path,
    metadata: Mapping[str, str],
    *,
    rest: str,
    scratch: Path,
    pictures: CalibrationImages,
    geometry: Geometry,
    cache: Cache,
    progress: Callable[[str], None],
    callbacks: BuildCallbacks,
) -> Calibrated:
    """Write the image encoder with int8 products; its calibration is kept for the next time."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        float32, quantized = (Path(folder) / f"{name}.onnx" for name in ("float32", "quantized"))
        export_onnx_graph(module, spec, float32, metadata, OPSETS[INT8])
        progress(f"calibrate {spec.name}")
        ranges = cached_ranges(
            cache,
            hash_graph(float32),
            pictures,
            lambda: calibrate(
                module, product_names(float32), pictures.used, geometry, callbacks.on_progress
            ),
        )
        progress(f"quantize {spec.name}")
        if rest == FP32:
            quantize_graph(float32, path, spec, ranges, rest)
        else:
            quantize_graph(float32, quantized, spec, ranges, rest)
            type_graph(quantized, path, spec, rest)
    return Calibrated(pictures, ranges)
