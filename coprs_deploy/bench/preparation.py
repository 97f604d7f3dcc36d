"""Steps of preparation, each for a process of its own: exports, images, random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

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
    compute_capabilities: tuple[str, ...] = (),
    calibration: str | None = None,
) -> dict[str, Any]:
    """Export a checkpoint with all checks and builds; return metrics and the check's accuracy."""
    extra: dict[str, Any] = {} if calibration is None else {"calibration_images": Path(calibration)}
    options = ExportOptions(
        runtime=runtime,
        precision=precision,
        targets=OptimizationProfile.parse(targets),
        images=OptimizationProfile.parse(images),
        aspect_ratio=parse_aspect_ratio(aspect_ratio) if aspect_ratio else None,
        drop_padding=drop_padding,
        external_policy=True,
        overwrite=True,
        compute_capabilities=tuple(compute_capabilities),
        **extra,
    )
    report = export_checkpoint(checkpoint, out, options)
    manifest, peak_bytes = report.bundle.manifest, peak_memory_bytes()

    def seconds(prefix: str) -> float:
        return sum(value for step, value in report.seconds.items() if step.startswith(prefix))

    metrics = {
        "export_s": sum(report.seconds[f"export {name}"] for name in GRAPH_NAMES),
        "check_s": seconds("check "),
        "total_s": seconds(""),
        "size_bytes": float(sum(file.size_bytes for file in manifest.files)),
        "weights_bytes": float(report.weights_bytes),
        "peak_export_bytes": float(report.peak_bytes_export),
        "peak_bytes": float(peak_bytes),
        "export_peak_over_weights": report.peak_bytes_export / report.weights_bytes,
        "peak_over_weights": peak_bytes / report.weights_bytes,
    }
    engines = [g.engine for g in manifest.graphs.values() if g.engine is not None]
    if engines:
        metrics["build_s"] = seconds("build ")
        metrics["engines_bytes"] = float(sum(engine.size_bytes for engine in engines))
    records = {record.graph: record for record in manifest.equivalence}
    end = records["end_to_end"]
    accuracy = {
        "inputs": end.inputs,
        "embedding_cosine": records["image_encoder"].cosine,
        "prior_relative_error": records["prior"].relative_error,
        "mask_relative_error": end.relative_error,
        "mask_iou_min": end.mask_iou,
        "note": "the export's own check, random concentrations; worst of its inputs",
    }
    return {"metrics": metrics, "accuracy": accuracy}


def draw_images(out: str, count: int, aspect_ratio: str) -> None:
    """Write generated training scenes as images, cut to an aspect ratio."""
    from PIL import Image

    from coprs_deploy.data.synthetic import PLAIN
    from coprs_deploy.data.synthetic.scene import make_scene

    Path(out).mkdir(exist_ok=True)
    width, height = parse_aspect_ratio(aspect_ratio) if aspect_ratio else (1, 1)
    rows, columns = unpadded_size(height, width, PLAIN.image_size)
    for seed in range(count):
        image = Image.fromarray(make_scene(PLAIN, seed).image[:rows, :columns])
        image.save(Path(out) / f"{seed}.png")


def make_random_checkpoint(out: str, sam: str) -> None:
    """Write a checkpoint of a SAM size with random weights and a tiny policy."""
    from coprs_deploy.conversion import ConversionOptions, random_checkpoint

    random_checkpoint(out, "tiny", sam, ConversionOptions(overwrite=True))


def write_sam_weights(out: str, checkpoint: str) -> None:
    """Write the weights of a checkpoint as a ``sam_vit_*.pth`` file."""
    import torch
    from safetensors.torch import load_file

    from coprs_deploy.checkpoint import SEGMENTATION_FILE

    tensors = load_file(Path(checkpoint) / SEGMENTATION_FILE)
    torch.save({n: t for n, t in tensors.items() if not n.startswith("prior.")}, out)


def export_segment_anything(out: str, checkpoint: str) -> None:
    """Export segment-anything's encoder with the exporter's defaults as ``encoder.onnx``."""
    import torch

    from coprs_deploy.checkpoint import read_checkpoint
    from coprs_deploy.conversion.peer_encoder import segment_anything_encoder

    source = read_checkpoint(checkpoint)
    size = source.config.model.geometry.image_size
    Path(out).mkdir(exist_ok=True)
    torch.onnx.export(
        segment_anything_encoder(source),
        (torch.zeros(1, 3, size, size),),
        str(Path(out) / "encoder.onnx"),
        input_names=["image"],
        output_names=["image_embedding"],
        dynamo=True,
        external_data=True,
        verbose=False,
    )


def write_rounded_graphs(out: str, checkpoint: str, precision: str) -> None:
    """Write the three graphs of a precision with every rounding between two nodes explicit."""
    from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
    from coprs_deploy.export.graph_writer import write_graph
    from coprs_deploy.export.precision import FP32, write_rounded_graph
    from coprs_deploy.specs import graph_specs

    source = read_checkpoint(checkpoint)
    specs = graph_specs(source.config.model.geometry, source.config.model.policy_hidden_size)
    Path(out).mkdir(exist_ok=True)
    for name, module in load_segmentation_model(source).graph_modules().items():
        target = Path(out) / f"{name}.onnx"
        with tempfile.TemporaryDirectory(dir=out) as folder:
            path, scratch = (
                target if precision == FP32 else Path(folder) / target.name,
                Path(folder),
            )
            write_graph(module, specs[name], path, {}, precision=precision, scratch=scratch)
            if path != target:
                write_rounded_graph(path, target)
