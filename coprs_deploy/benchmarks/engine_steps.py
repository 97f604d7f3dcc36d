"""The steps of :mod:`coprs_deploy.benchmarks.full_size_engines`, each in a process of its own.

``python -m coprs_deploy.benchmarks.engine_steps STEP SETTINGS`` runs one step with settings in JSON
and prints its result in JSON, with the peak memory of the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, open_graph
from coprs_deploy.engines.cache import BuildCache
from coprs_deploy.engines.trt.build import BuildSettings, build_engine_bytes
from coprs_deploy.engines.trt.cache import graph_bytes
from coprs_deploy.engines.trt.checks import describe_engine
from coprs_deploy.export.calibration import MIN_IMAGES, find_calibration_images
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.precision import FP32, INT8, rest_precision, write_rounded_graph
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec, graph_specs

RUNTIME = "tensorrt-rtx"
REFERENCE = "reference.npy"
PICTURES = "pictures"


def make_checkpoint(checkpoint: str, size: str) -> dict[str, Any]:
    """Write random weights of a size of SAM, and pictures for int8 beside them."""
    from PIL import Image

    from coprs_deploy.conversion import random_checkpoint

    made = random_checkpoint(checkpoint, "tiny", size)
    folder = Path(checkpoint).with_name(PICTURES)
    folder.mkdir(exist_ok=True)
    for number in range(MIN_IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.png")
    encoder = load_segmentation_model(made).image_encoder
    return {"weights_bytes": sum(p.numel() * p.element_size() for p in encoder.parameters())}


def run_reference(checkpoint: str, folder: str) -> dict[str, Any]:
    """Keep what PyTorch computes in float32 on one picture."""
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
    encoder = load_segmentation_model(source).image_encoder
    spec, scratch = _spec(source), path.parent
    if precision == INT8:
        write_int8_graph(
            encoder,
            spec,
            path,
            {},
            rest=rest_precision(RUNTIME, precision),
            scratch=scratch,
            images=find_calibration_images(Path(checkpoint).with_name(PICTURES)),
            geometry=source.config.model.geometry,
            cache=BuildCache(scratch / "cache"),
            on_step=lambda step: None,
            on_progress=lambda text: None,
        )
    else:
        write_graph(encoder, spec, path, {}, precision=precision, scratch=scratch)
    return {"graph_bytes": graph_bytes(path)}


def check_graph(checkpoint: str, graph: str, folder: str, precision: str) -> dict[str, Any]:
    """Compare a typed graph, every rounding written out, with the reference."""
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
    wanted = np.load(Path(folder) / REFERENCE)
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return {
        "cosine": float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))),
        "relative": float(np.abs(a - b).max() / np.abs(b).max()),
    }


def build_engine(checkpoint: str, graph: str, gpus: list[str]) -> dict[str, Any]:
    """Compile a graph for some GPUs; the plan is measured and let go of."""
    spec = _spec(read_checkpoint(checkpoint))
    built = build_engine_bytes(Path(graph), spec, BuildSettings(RUNTIME, tuple(gpus)))
    text = describe_engine(built.data)
    return {
        "build_seconds": built.seconds,
        "engine_bytes": len(memoryview(built.data)),
        "network_layers": built.network_layers,
        "tensor_types": None if text is None else dict(text.types),
    }


STEPS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "checkpoint": make_checkpoint,
    "reference": run_reference,
    "export": export_encoder,
    "check": check_graph,
    "build": build_engine,
}


def _spec(source: Checkpoint) -> GraphSpec:
    model = source.config.model
    return graph_specs(model.geometry, model.policy_width)[IMAGE_ENCODER]


def _image(source: Checkpoint) -> Any:
    return sample_inputs(source.config.model.geometry, 1)[0].prepared.image


def own_peak_bytes() -> int:
    """Largest resident memory of this process alone; ``ru_maxrss`` would count its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main(arguments: list[str]) -> None:
    """Run one step."""
    step, settings = arguments
    result = STEPS[step](**json.loads(settings))
    print(json.dumps({**result, "peak_bytes": own_peak_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1:])
