"""What has to be made before it can be measured, each step for a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coprs_deploy.bundle import EquivalenceRecord
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.images import unpadded_size
from coprs_deploy.machine import peak_memory_bytes
from coprs_deploy.specs import GRAPH_NAMES, OptimizationProfile, parse_aspect_ratio


def export_bundle(
    checkpoint: str,
    out: str,
    runtime: str,
    precision: str,
    *,
    targets: str = "1",
    images: str = "1",
    aspect_ratio: str = "",
    drop_padding: bool = False,
    gpus: tuple[str, ...] = (),
    calibration: str | None = None,
) -> dict[str, Any]:
    """Export a checkpoint with all checks and builds, as ``coprs-deploy export`` does.

    Returns:
        ``figures``: seconds and bytes; ``equality``: what was measured against PyTorch, by graph.
    """
    extra: dict[str, Any] = {} if calibration is None else {"calibration_images": Path(calibration)}
    options = ExportOptions(
        runtime=runtime,
        precision=precision,
        targets=OptimizationProfile.parse(targets),
        images=OptimizationProfile.parse(images, "images"),
        aspect_ratio=parse_aspect_ratio(aspect_ratio) if aspect_ratio else None,
        drop_padding=drop_padding,
        external_policy=True,
        overwrite=True,
        compute_capabilities=tuple(gpus),
        **extra,
    )
    report = export_checkpoint(checkpoint, out, options)
    graphs = report.bundle.manifest.graphs
    figures = {
        "export_s": sum(report.seconds[f"export {name}"] for name in GRAPH_NAMES),
        "check_s": _sum(report.seconds, "check "),
        "total_s": sum(report.seconds.values()),
        "size_bytes": float(sum(file.size_bytes for file in report.bundle.manifest.files)),
        "weights_bytes": float(report.weights_bytes),
        "peak_export_bytes": float(report.peak_bytes_export),
        "peak_bytes": float(peak_memory_bytes()),
    }
    engines = [graph.engine for graph in graphs.values() if graph.engine is not None]
    if engines:
        figures["build_s"] = _sum(report.seconds, "build ")
        figures["engines_bytes"] = float(sum(engine.size_bytes for engine in engines))
    return {"figures": figures, "equality": equality(report.bundle.manifest.equivalence)}


def equality(records: tuple[EquivalenceRecord, ...]) -> dict[str, dict[str, Any]]:
    """Give measured equality by graph as plain data."""
    return {record.graph: record.to_json() for record in records}


def _sum(seconds: dict[str, float], prefix: str) -> float:
    return sum(value for step, value in seconds.items() if step.startswith(prefix))


def random_images(folder: str, count: int, aspect_ratio: str = "") -> dict[str, Any]:
    """Draw scenes of training's kind, none of them held out, as pictures; cut to an aspect."""
    from PIL import Image

    from coprs_deploy.data.synthetic import PLAIN
    from coprs_deploy.data.synthetic.scene import make_scene

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    width, height = parse_aspect_ratio(aspect_ratio) if aspect_ratio else (1, 1)
    for seed in range(count):
        scene = make_scene(PLAIN, seed).image
        rows, columns = unpadded_size(height, width, PLAIN.image_size)
        Image.fromarray(scene[:rows, :columns]).save(out / f"{seed}.png")
    return {}


def make_random_checkpoint(out: str, sam: str) -> dict[str, Any]:
    """Write a checkpoint of a SAM size with random weights and a tiny policy."""
    from coprs_deploy.conversion import random_checkpoint
    from coprs_deploy.conversion.converters import ConversionOptions

    random_checkpoint(out, "tiny", sam, ConversionOptions(overwrite=True))
    return {}


def write_rounded_graphs(checkpoint: str, folder: str, precision: str) -> dict[str, Any]:
    """Write the three graphs of a precision with every rounding between two nodes written out."""
    import tempfile

    from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
    from coprs_deploy.export.graph_writer import write_graph
    from coprs_deploy.export.precision import FP32, write_rounded_graph
    from coprs_deploy.specs import graph_specs

    source = read_checkpoint(checkpoint)
    config = source.config.model
    stages = load_segmentation_model(source).graph_modules()
    specs = graph_specs(config.geometry, config.policy_width)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name in GRAPH_NAMES:
        target = out / f"{name}.onnx"
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            path = target if precision == FP32 else Path(scratch) / f"{name}.onnx"
            write_graph(
                stages[name], specs[name], path, {}, precision=precision, scratch=Path(scratch)
            )
            if path != target:
                write_rounded_graph(path, target)
    return {}
