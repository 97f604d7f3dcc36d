"""Engines of SAM's real image encoders, without a GPU: accuracy, build time, memory, size.

The weights are random. Each graph is compared with PyTorch on the CPU, every rounding explicit, and
compiled with TensorRT-RTX. Every step runs in a process of its own, and a step whose result is in
the work folder is not repeated.

    python benchmarks/full_size_engines.py --out engines/records --work-dir DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.artifacts import write_json
from coprs_deploy.bench.worker import call_once
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.console import markdown_table
from coprs_deploy.engines import RunnerOptions, open_graph
from coprs_deploy.engines.cache import Cache, graph_bytes
from coprs_deploy.engines.trt.build import BuildSettings, build_engine_bytes
from coprs_deploy.engines.trt.checks import describe_engine
from coprs_deploy.export.calibration import MIN_IMAGES, find_calibration_images
from coprs_deploy.export.equivalence import cosine_similarity, relative_error
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.precision import FP32, INT8, rest_precision, write_rounded_graph
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.machine import installed_versions, machine_record, peak_memory_bytes
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec, graph_specs

NAME = "full-size-engines"
SIZES = ("vit_b", "vit_l", "vit_h")
PRECISIONS = ("bf16", "fp16")
"""By default; int8 is calibrated for minutes first."""
COMPUTE_CAPABILITIES = ("sm_80", "sm_89", "sm_120")
RUNTIME = "tensorrt-rtx"
VERSIONS = (RUNTIME, "torch", "onnx", "onnxruntime")

REFERENCE = "reference.npy"
IMAGES = "images"
STEP_TIMEOUT_S = 4 * 3600.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        sizes: SAM sizes.
        precisions: precisions of the graphs.
        prepare_only: stop before the builds, whose times need an idle machine.
    """

    sizes: Sequence[str] = SIZES
    precisions: Sequence[str] = PRECISIONS
    prepare_only: bool = False


def run(
    out: Path,
    work_dir: Path,
    request: Request | None = None,
    progress: Progress = lambda step: None,
) -> dict[str, Any]:
    """Measure and write ``full-size-engines.json`` and ``.md``; return the report.

    Args:
        out: folder of the report.
        work_dir: folder of weights, graphs and the results of steps, some 15 GB with ViT-H.
        request: what is measured.
        progress: called with the name of each step as it starts.
    """
    request = request or Request()
    rows = [
        _measure(size, precision, work_dir / size, request, progress)
        for size in request.sizes
        for precision in request.precisions
    ]
    installed = installed_versions()
    report = {
        "suite": NAME,
        "machine": machine_record().to_json(),
        "versions": {name: installed[name] for name in VERSIONS if name in installed},
        "weights": "random",
        "gpus": list(COMPUTE_CAPABILITIES),
        "rows": rows,
    }
    if not request.prepare_only:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{NAME}.json", report)
        (out / f"{NAME}.md").write_text(render(report), encoding="utf-8")
    return report


def _measure(
    size: str, precision: str, folder: Path, request: Request, progress: Progress
) -> dict[str, Any]:
    checkpoint, graphs = str(folder / "checkpoint"), folder / precision
    graphs.mkdir(parents=True, exist_ok=True)
    graph = str(graphs / "image_encoder.onnx")

    def step(function: str, place: Path, **settings: Any) -> dict[str, Any]:
        progress(f"{size} {precision}: {function}")
        return run_step(function, place / f"{function}.json", checkpoint=checkpoint, **settings)

    made = step("make_checkpoint", folder, size=size)
    step("run_reference", folder, folder=str(folder))
    exported = step("export_encoder", graphs, graph=graph, precision=precision)
    checked = step("check_graph", graphs, graph=graph, folder=str(folder), precision=precision)
    row = {"sam": size, "precision": precision, "weights_bytes": made["weights_bytes"]}
    row |= {"graph_bytes": exported["graph_bytes"], **checked}
    if not request.prepare_only:
        gpus = list(COMPUTE_CAPABILITIES)
        row |= step("build_engine", graphs, graph=graph, compute_capabilities=gpus)
    return row


def run_step(function: str, kept: Path, **settings: Any) -> dict[str, Any]:
    """Run a function of this script in a process of its own, or read its earlier result.

    Raises:
        WorkerError: it failed.
    """
    if not kept.exists():
        write_json(kept, call_once(f"{__file__}:{function}", STEP_TIMEOUT_S, **settings))
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return result


def make_checkpoint(checkpoint: str, size: str) -> dict[str, Any]:
    """Write random weights of a SAM size, and images for int8 beside them."""
    from PIL import Image

    from coprs_deploy.conversion import random_checkpoint

    made = random_checkpoint(checkpoint, "tiny", size)
    folder = Path(checkpoint).with_name(IMAGES)
    folder.mkdir(exist_ok=True)
    for number in range(MIN_IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
    encoder = load_segmentation_model(made).image_encoder
    return {"weights_bytes": sum(p.numel() * p.element_size() for p in encoder.parameters())}


def run_reference(checkpoint: str, folder: str) -> dict[str, Any]:
    """Save what PyTorch computes in float32 on one image."""
    import torch

    source = read_checkpoint(checkpoint)
    encoder = load_segmentation_model(source).image_encoder
    with torch.inference_mode():
        embedding = encoder(torch.from_numpy(_image(source))).numpy()
    np.save(Path(folder) / REFERENCE, embedding)
    return {}


def export_encoder(checkpoint: str, graph: str, precision: str) -> dict[str, Any]:
    """Write the image encoder as a typed graph."""
    path, source = Path(graph), read_checkpoint(checkpoint)
    model = load_segmentation_model(source)
    model.fold_batch_norms()
    encoder = model.image_encoder
    spec, scratch = _spec(source), path.parent
    if precision == INT8:
        write_int8_graph(
            encoder,
            spec,
            path,
            {},
            rest=rest_precision(RUNTIME, precision),
            scratch=scratch,
            images=find_calibration_images(Path(checkpoint).with_name(IMAGES)),
            geometry=source.config.model.geometry,
            cache=Cache(scratch / "cache"),
            on_step=lambda step: None,
            on_progress=lambda text: None,
        )
    else:
        write_graph(encoder, spec, path, {}, precision=precision, scratch=scratch)
    return {"graph_bytes": graph_bytes(path)}


def check_graph(checkpoint: str, graph: str, folder: str, precision: str) -> dict[str, Any]:
    """Compare a typed graph, every rounding explicit, with the reference."""
    path, source = Path(graph), read_checkpoint(checkpoint)
    rounded = path
    if precision != FP32:
        rounded = path.with_name("rounded.onnx")
        write_rounded_graph(path, rounded)
    try:
        with open_graph("onnxruntime", rounded, _spec(source), RunnerOptions()) as runner:
            found = runner(image=_image(source))["image_embedding"].numpy()
    finally:
        if rounded != path:
            for written in path.parent.glob("rounded.onnx*"):
                written.unlink()
    expected = np.load(Path(folder) / REFERENCE)
    return {
        "cosine": cosine_similarity(found, expected),
        "relative_error": relative_error(found, expected),
    }


def build_engine(checkpoint: str, graph: str, compute_capabilities: list[str]) -> dict[str, Any]:
    """Compile a graph for some GPUs; the engine is measured and discarded."""
    spec = _spec(read_checkpoint(checkpoint))
    built = build_engine_bytes(
        Path(graph), spec, BuildSettings(RUNTIME, tuple(compute_capabilities))
    )
    text = describe_engine(built.data)
    return {
        "build_seconds": built.seconds,
        "engine_bytes": len(memoryview(built.data)),
        "network_layers": built.network_layers,
        "tensor_types": None if text is None else dict(text.types),
        "build_peak_bytes": peak_memory_bytes(),
    }


def _spec(source: Checkpoint) -> GraphSpec:
    model = source.config.model
    return graph_specs(model.geometry, model.policy_hidden_size)[IMAGE_ENCODER]


def _image(source: Checkpoint) -> Any:
    return sample_inputs(source.config.model.geometry, 1)[0].prepared.image


def render(report: dict[str, Any]) -> str:
    """Render the report as Markdown."""
    described = report["machine"] | report["versions"]
    rows = [
        (
            row["sam"],
            row["precision"],
            f"{row['graph_bytes'] / 1e6:,.0f} MB",
            f"{row['cosine']:.7f}",
            f"{row['relative_error']:.1e}",
            f"{row['build_seconds']:.1f} s",
            f"{row['build_peak_bytes'] / 1e6:,.0f} MB",
            f"{row['build_peak_bytes'] / row['graph_bytes']:.1f} x",
            f"{row['engine_bytes'] / 1e6:,.0f} MB",
        )
        for row in report["rows"]
    ]
    heads = ("", "precision", "graph", "cosine", "relative error", "build", "memory")
    lines = [
        "# Engines of the full-size image encoders",
        "",
        "SAM's real image encoders with **random weights**, compiled with TensorRT-RTX for "
        f"{', '.join(report['gpus'])} at once, on a machine without a GPU. Made by",
        "`python benchmarks/full_size_engines.py --out engines/records --work-dir DIR`.",
        "",
        ", ".join(f"{key} {value}" for key, value in described.items()) + ".",
        "",
        "Cosine and relative error are of the embedding of one image, the typed graph with every "
        "rounding explicit against PyTorch in float32. Memory is the peak of the building process.",
        "",
        *markdown_table((*heads, "over graph", "engine"), rows),
        "",
        "No engine of this table has run.",
    ]
    return "\n".join(lines) + "\n"


def failures(report: dict[str, Any]) -> list[str]:
    """List the graphs that exceed the tolerance of their precision; empty when none does."""
    found = []
    for row in report["rows"]:
        allowed = TOLERANCES[RUNTIME, row["precision"]][IMAGE_ENCODER]
        if not (
            row["cosine"] >= allowed.cosine and row["relative_error"] <= allowed.relative_error
        ):
            found.append(
                f"{row['sam']} {row['precision']}: cosine {row['cosine']:.7f}, relative error "
                f"{row['relative_error']:.1e} (allowed: {allowed.cosine}, "
                f"{allowed.relative_error:.0e})"
            )
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure; exit code 1 when a graph exceeds its tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the report"
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, metavar="DIR", help="folder of graphs and results"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="SAM sizes, light encoders")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="also: fp32, int8")
    parser.add_argument("--prepare-only", action="store_true", help="stop before the builds")
    given = parser.parse_args(arguments)
    request = Request(given.sizes.split(","), given.precisions.split(","), given.prepare_only)
    log = sys.stderr
    report = run(given.out, given.work_dir, request, lambda step: print(step, file=log, flush=True))
    failed = failures(report)
    for line in failed:
        print(line, file=log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
