"""Write one module as an ONNX file in some precision; intermediate graphs are removed again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.engines.cache import Cache
from coprs_deploy.engines.trt.cache import hash_graph
from coprs_deploy.export.calibration import CalibrationImages, Ranges, cached_ranges, calibrate
from coprs_deploy.export.onnx_graph import export_onnx_graph
from coprs_deploy.export.precision import FP32, INT8, OPSETS, type_graph
from coprs_deploy.export.quantization import product_names, quantize_graph
from coprs_deploy.specs import Geometry, GraphSpec

if TYPE_CHECKING:
    import torch

    from coprs_deploy.models.image_encoder import ImageEncoder


def write_graph(
    module: torch.nn.Module,
    spec: GraphSpec,
    path: Path,
    metadata: Mapping[str, str],
    *,
    precision: str,
    scratch: Path,
) -> None:
    """Write a module as ONNX in fp32, bf16 or fp16; see :func:`export_onnx_graph`.

    ``scratch`` is for the intermediate float32 graph.
    """
    if precision == FP32:
        export_onnx_graph(module, spec, path, metadata, OPSETS[precision])
        return
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        float32 = Path(directory) / path.name
        export_onnx_graph(module, spec, float32, metadata, OPSETS[precision])
        type_graph(float32, path, spec, precision)


def write_int8_graph(
    encoder: ImageEncoder,
    spec: GraphSpec,
    path: Path,
    metadata: Mapping[str, str],
    *,
    rest: str,
    scratch: Path,
    images: CalibrationImages,
    geometry: Geometry,
    cache: Cache,
    on_step: Callable[[str], None],
    on_progress: Callable[[str], None],
) -> Ranges:
    """Write the image encoder as ONNX with int8 products; see :func:`export_onnx_graph`.

    ``rest`` is the precision of everything else, ``scratch`` is for intermediate graphs, and
    ``cache`` keeps the calibration ranges for the next export. ``on_step`` is called with the name
    of each step, ``on_progress`` with each calibration image.

    Returns:
        The calibration ranges.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        float32, quantized = (Path(directory) / f"{name}.onnx" for name in ("float32", "quantized"))
        export_onnx_graph(encoder, spec, float32, metadata, OPSETS[INT8])
        on_step(f"calibrate {spec.name}")
        ranges = cached_ranges(
            cache,
            hash_graph(float32),
            images,
            lambda: calibrate(
                encoder,
                product_names(float32, encoder.int8_operators),
                images.used,
                geometry,
                on_progress,
            ),
        )
        on_step(f"quantize {spec.name}")
        quantize_graph(float32, path if rest == FP32 else quantized, spec, ranges, rest)
        if rest != FP32:
            type_graph(quantized, path, spec, rest)
    return ranges
