"""Steps of preparation, each for a process of its own: exports, images, random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coprs_deploy import conversion
from coprs_deploy.bench.accuracy import ask, open_policy, open_reference, scene_outputs, scenes
from coprs_deploy.bench.case import Values, write_arrays
from coprs_deploy.bench.report import Accuracy
from coprs_deploy.checkpoint import (
    POLICY_DIRECTORY,
    SEGMENTATION_FILE,
    load_segmentation_model,
    read_checkpoint,
)
from coprs_deploy.conversion import ConversionOptions, checkpoint_from_policy_and_sam
from coprs_deploy.conversion.peer_encoder import segment_anything_encoder
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.scene import make_scene
from coprs_deploy.evaluation.metrics import union
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.export.equivalence import run_graph
from coprs_deploy.export.graph_writer import write_graph
from coprs_deploy.export.precision import write_rounded_graph
from coprs_deploy.export.samples import SampleInput, sample_inputs
from coprs_deploy.images import prepare_image, unpadded_size
from coprs_deploy.machine import peak_memory_bytes
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, PRIOR, ValidRegion, graph_specs


def export_bundle(out: Path, checkpoint: Path, options: ExportOptions) -> dict[str, Any]:
    """Export a checkpoint with all checks and builds.

    Returns:
        ``stages`` in milliseconds, ``metrics``, and ``accuracy`` as the export's check found it.
    """
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
    accuracy = Accuracy(
        inputs=end.inputs,
        embedding_cosine=records[IMAGE_ENCODER].cosine,
        prior_relative_error=records[PRIOR].relative_error,
        mask_relative_error=end.relative_error,
        mask_iou_min=end.mask_iou,
        note="the export's own check, random concentrations; worst of its inputs",
    )
    steps = [name for name in ("export", "check", "build") if f"{name}_s" in metrics]
    stages = {name: 1e3 * metrics[f"{name}_s"] for name in steps}
    return {"stages": stages, "metrics": metrics, "accuracy": accuracy}


def convert(out: Path, checkpoint: Path, sam: Path) -> dict[str, Any]:
    """Convert a checkpoint's policy and a ``sam_vit_*.pth`` file; return ``metrics``."""
    policy, options = checkpoint / POLICY_DIRECTORY, ConversionOptions(overwrite=True)
    checkpoint_from_policy_and_sam(policy, sam, out, options)
    peak, weights = peak_memory_bytes(), (checkpoint / SEGMENTATION_FILE).stat().st_size
    return {"metrics": {"peak_bytes": float(peak), "peak_over_weights": peak / weights}}


def write_inputs(
    out: Path,
    checkpoint: Path | None,
    bundle: Path | None,
    *,
    has_gt: bool,
    count: int,
    aspect_ratio: tuple[int, int] | None,
    preset: str = PLAIN.name,
) -> None:
    """Write ``0.safetensors`` and so on: inputs and float32 outputs of every graph.

    ``has_gt`` takes held-out scenes of the preset with their ground truth and the concentrations
    that the policy finds, without scenes in which it finds no target; else images and
    concentrations are the random ones of the equivalence check, of one aspect ratio or of several.
    """
    reference = open_reference(checkpoint, bundle)
    geometry, found = reference.geometry, list[Values]()
    if has_gt:
        assert checkpoint is not None
        with open_policy(read_checkpoint(checkpoint)) as policy:
            examples = scenes(count, preset=preset)
            answered = [(example, ask(policy, example).concentrations) for example in examples]
        answered = [(example, vectors) for example, vectors in answered if len(vectors)]
        found = [{"ground_truth": union(example.masks)} for example, _ in answered]
        drawn = [SampleInput(prepare_image(e.image, geometry), v[-1:]) for e, v in answered]
    else:
        shape = aspect_ratio or (1, 1)
        longest = unpadded_size(*shape[::-1], geometry.image_size)
        region = ValidRegion(shape, *longest) if aspect_ratio else None
        drawn = sample_inputs(geometry, reference.policy_hidden_size, valid_region=region)[:count]
        found = [{} for _ in drawn]
    for sample, values in zip(drawn, found, strict=True):
        original_size = np.array(sample.prepared.original_size)
        values |= {**sample.first_inputs(), "original_size": original_size}
    for name in GRAPH_NAMES:
        with reference.open(name) as runner:
            for values in found:
                values[runner.spec.outputs[0].name] = run_graph(runner, values)
    out.mkdir(parents=True, exist_ok=True)
    for index, values in enumerate(found):
        write_arrays(out / f"{index}.safetensors", values)


def write_scenes(
    out: Path, checkpoint: Path, count: int, side: int | None, preset: str = PLAIN.name
) -> None:
    """Write the concentrations and masks of PyTorch in float32 on held-out scenes as one file."""
    with open_policy(read_checkpoint(checkpoint)) as policy:
        examples = scenes(count, side, preset)
        write_arrays(out, scene_outputs(policy, open_reference(checkpoint), examples))


def draw_images(out: Path, count: int, aspect_ratio: tuple[int, int]) -> None:
    """Write generated training scenes as images, cut to an aspect ratio."""
    out.mkdir(exist_ok=True)
    rows, columns = unpadded_size(*aspect_ratio[::-1], PLAIN.image_size)
    for seed in range(count):
        image = Image.fromarray(make_scene(PLAIN, seed).image[:rows, :columns])
        image.save(out / f"{seed}.png")


def random_checkpoint(out: Path, sam: str) -> None:
    """Write a checkpoint of a SAM size with random weights and a tiny policy."""
    conversion.random_checkpoint(out, "tiny", sam, ConversionOptions(overwrite=True))


def write_sam_weights(out: Path, checkpoint: Path) -> None:
    """Write the weights of a checkpoint as a ``sam_vit_*.pth`` file."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / SEGMENTATION_FILE)
    torch.save({n: t for n, t in tensors.items() if not n.startswith("prior.")}, out)


def export_segment_anything(out: Path, checkpoint: Path) -> None:
    """Export segment-anything's encoder with the exporter's defaults as ``encoder.onnx``."""
    import torch

    source = read_checkpoint(checkpoint)
    size = source.config.model.geometry.image_size
    out.mkdir(exist_ok=True)
    encoder, image = segment_anything_encoder(source), torch.zeros(1, 3, size, size)
    names: Any = {"input_names": ["image"], "output_names": ["image_embedding"]}
    torch.onnx.export(encoder, (image,), str(out / "encoder.onnx"), **names)


def write_rounded_graphs(out: Path, checkpoint: Path, precision: str) -> None:
    """Write the three graphs of a precision with every rounding between two nodes explicit."""
    source = read_checkpoint(checkpoint)
    specs = graph_specs(source.config.model.geometry, source.config.model.policy_hidden_size)
    out.mkdir(exist_ok=True)
    for name, module in load_segmentation_model(source).graph_modules().items():
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            path = Path(scratch) / f"{name}.onnx"
            write_graph(module, specs[name], path, {}, precision=precision, scratch=path.parent)
            write_rounded_graph(path, out / path.name)
