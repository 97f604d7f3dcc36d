"""Time, memory and parameters of every image encoder at full size, on this machine's CPU.

The weights are random. Every step runs in a process of its own, and a step whose result is in the
work folder is not repeated, so that a run can be made in pieces; the times need an idle machine.

    python benchmarks/image_encoders.py --out benchmarks/reports --work-dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.artifacts import write_json
from coprs_deploy.bench.worker import call_once
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.console import markdown_table
from coprs_deploy.encoder_config import ENCODERS
from coprs_deploy.engines import RunnerOptions, open_graph
from coprs_deploy.engines.cache import Cache, graph_bytes
from coprs_deploy.export.calibration import MIN_IMAGES, find_calibration_images
from coprs_deploy.export.equivalence import cosine_similarity, relative_error
from coprs_deploy.export.graph_writer import write_graph, write_int8_graph
from coprs_deploy.export.precision import FP32, INT8
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.machine import (
    describe_processor,
    machine_record,
    peak_memory_bytes,
)
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.specs import IMAGE_ENCODER, GraphSpec, graph_specs

NAME = "image-encoders"
SIZES = ("vit_h", "vit_l", "vit_b", *ENCODERS)
BASELINE = "vit_h"
PRECISIONS = (FP32, INT8)
RUNTIMES = ("onnxruntime", "openvino")

GOALS = {"tinyvit_5m": 1 / 25}
"""Largest share of ViT-H's time in float32, by encoder and runtime alike."""
FASTEST_GOAL = 1 / 60
INT8_GOAL = 0.6
"""Largest share of TinyViT's float32 time that its int8 takes."""

MIN_RUNS, MAX_RUNS, RUN_SECONDS = 3, 30, 12.0
STEP_TIMEOUT_S = 3600.0
REFERENCE, IMAGES = "reference.npy", "images"

Progress = Callable[[str], None]


def run(
    out: Path,
    work_dir: Path,
    sizes: Sequence[str] = SIZES,
    *,
    prepare_only: bool = False,
    progress: Progress = lambda step: None,
) -> dict[str, Any]:
    """Measure and write ``image-encoders.json`` and ``.md``; return the report.

    Args:
        out: folder of the report.
        work_dir: folder of weights, graphs and the results of steps, some 15 GB with ViT-H.
        sizes: names of encoders.
        prepare_only: stop before the times, which need an idle machine.
        progress: called with the name of each step as it starts.
    """
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows += _measure(size, work_dir / size, prepare_only, progress)
    report = {
        "suite": NAME,
        "machine": machine_record().to_json(),
        "weights": "random",
        "rows": rows,
    }
    if not prepare_only:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{NAME}.json", report)
        (out / f"{NAME}.md").write_text(render(report), encoding="utf-8")
    return report


def _measure(
    size: str, folder: Path, prepare_only: bool, progress: Progress
) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)

    def step(function: str, kept: str, **settings: Any) -> dict[str, Any]:
        path = folder / f"{kept}.json"
        if not path.exists():
            progress(f"{size}: {kept}")
            target = f"{__file__}:{function}"
            write_json(path, call_once(target, STEP_TIMEOUT_S, folder=str(folder), **settings))
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    rows = []
    made = step("make_checkpoint", "checkpoint-made", size=size)
    for precision in PRECISIONS:
        graph = step("export_encoder", f"export-{precision}", precision=precision)
        for runtime in () if prepare_only else runtimes(precision):
            settings = {"runtime": runtime, "precision": precision}
            timed = step("time_encoder", f"time-{runtime}-{precision}", **settings)
            rows.append({"encoder": size, **settings, **made, **graph, **timed})
    return rows


def runtimes(precision: str) -> list[str]:
    """Return the runtimes that compute a precision exactly on this processor."""
    exact = precision != "int8" or describe_processor().has_int8_units
    return [name for name in RUNTIMES if exact or name != "openvino"]


def make_checkpoint(folder: str, size: str) -> dict[str, Any]:
    """Write random weights, images for int8 and what PyTorch computes on one image."""
    import torch
    from PIL import Image

    from coprs_deploy.conversion import random_checkpoint
    from coprs_deploy.training.distillation.estimate import encoder_cost

    made = random_checkpoint(Path(folder) / "checkpoint", "tiny", size)
    images = Path(folder) / IMAGES
    images.mkdir(exist_ok=True)
    for number in range(MIN_IMAGES):
        noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(images / f"{number}.png")
    encoder = load_segmentation_model(made).image_encoder
    with torch.inference_mode():
        embedding = encoder(torch.from_numpy(_image(made))).numpy()
    np.save(Path(folder) / REFERENCE, embedding)
    cost = encoder_cost(made.config.model.sam)
    return {
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "image_size": cost.image_size,
    }


def export_encoder(folder: str, precision: str) -> dict[str, Any]:
    """Write the image encoder as a graph; what is not int8 stays float32."""
    path = _graph(folder, precision)
    path.parent.mkdir(exist_ok=True)
    source = read_checkpoint(Path(folder) / "checkpoint")
    model = load_segmentation_model(source)
    model.fold_batch_norms()
    spec, scratch = _spec(source), path.parent
    if precision == FP32:
        write_graph(model.image_encoder, spec, path, {}, precision=FP32, scratch=scratch)
    else:
        write_int8_graph(
            model.image_encoder,
            spec,
            path,
            {},
            rest=FP32,
            scratch=scratch,
            images=find_calibration_images(Path(folder) / IMAGES),
            geometry=source.config.model.geometry,
            cache=Cache(scratch / "cache"),
            on_step=lambda step: None,
            on_progress=lambda text: None,
        )
    return {"graph_bytes": graph_bytes(path)}


def time_encoder(folder: str, runtime: str, precision: str) -> dict[str, Any]:
    """Time one image, and compare its embedding with PyTorch's in float32."""
    source = read_checkpoint(Path(folder) / "checkpoint")
    image, spec = _image(source), _spec(source)
    with open_graph(runtime, _graph(folder, precision), spec, RunnerOptions()) as runner:
        found = np.array(runner(image=image)["image_embedding"].numpy())
        milliseconds, cpu_milliseconds = list[float](), list[float]()
        end = time.perf_counter() + RUN_SECONDS
        while len(milliseconds) < MIN_RUNS or (
            len(milliseconds) < MAX_RUNS and time.perf_counter() < end
        ):
            start, cpu_start = time.perf_counter(), time.process_time()
            runner(image=image)["image_embedding"].numpy()
            milliseconds.append(1e3 * (time.perf_counter() - start))
            cpu_milliseconds.append(1e3 * (time.process_time() - cpu_start))
    expected = np.load(Path(folder) / REFERENCE)
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "cpu_ms": statistics.median(cpu_milliseconds),
        "load": os.getloadavg()[0],
        "runs": len(milliseconds),
        "peak_bytes": peak_memory_bytes(),
        "cosine": cosine_similarity(found, expected),
        "relative_error": relative_error(found, expected),
    }


def _graph(folder: str, precision: str) -> Path:
    return Path(folder) / precision / "image_encoder.onnx"


def _spec(source: Checkpoint) -> GraphSpec:
    model = source.config.model
    return graph_specs(model.geometry, model.policy_hidden_size)[IMAGE_ENCODER]


def _image(source: Checkpoint) -> Any:
    return sample_inputs(source.config.model.geometry, 1)[0].prepared.image


def render(report: dict[str, Any]) -> str:
    """Render the report as Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = []
    for row in report["rows"]:
        base = _time(report, BASELINE, row["runtime"], FP32)
        rows.append(
            (
                SAM_SIZES[row["encoder"]].encoder_name,
                f"{row['image_size']}",
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['multiply_adds'] / 1e9:.0f} G",
                f"{row['runtime']} {row['precision']}",
                f"{row['median_ms']:,.0f} ms",
                f"{row['min_ms']:,.0f} ms",
                f"{row['cpu_ms']:,.0f} ms",
                f"{row['load']:.1f}",
                f"1/{base / row['median_ms']:.1f}" if base else "-",
                f"{row['peak_bytes'] / 1e6:,.0f} MB",
                f"{row['graph_bytes'] / 1e6:,.0f} MB",
                f"{row['cosine']:.6f}",
            )
        )
    heads = ("encoder", "input, px", "parameters", "multiply-adds", "graph", "median", "fastest")
    last = ("CPU time", "load", "of ViT-H", "memory", "file", "cosine")
    lines = [
        "# Image encoders at full size",
        "",
        "One image through each image encoder, with **random weights**. Made by",
        "`python benchmarks/image_encoders.py --out benchmarks/reports --work-dir DIR`.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['vector_units'])}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {machine['system']}; commit "
        f"{machine['commit'] or 'unknown'}; {versions}.",
        "",
        f"Median and fastest of {MIN_RUNS} to {MAX_RUNS} runs after one warm-up, in a process of "
        "its own, whose peak resident memory is given. The share is of ViT-H's float32 median in "
        "the same runtime. CPU time is that of all threads of a run, load the machine's average "
        "over a minute, other processes included: above 2 on two cores, the times are those of a "
        "busy machine. The cosine is of the embedding against PyTorch in float32.",
        "",
        *markdown_table((*heads, *last), rows),
        "",
        *(f"- {line}" for line in goals(report)),
    ]
    return "\n".join(lines) + "\n"


def goals(report: dict[str, Any]) -> list[str]:
    """State each goal with what was measured; those without their rows are left out."""
    lines = []
    for runtime in RUNTIMES:
        base = _time(report, BASELINE, runtime, FP32)
        times = {size: _time(report, size, runtime, FP32) for size in ENCODERS}
        found = {size: value for size, value in times.items() if value}
        for size, share in GOALS.items():
            if base and size in found:
                lines.append(_goal(f"{runtime}: {size} over {BASELINE}", found[size] / base, share))
        if base and found:
            fastest = min(found, key=lambda size: found[size])
            what = f"{runtime}: the fastest, {fastest}, over {BASELINE}"
            lines.append(_goal(what, found[fastest] / base, FASTEST_GOAL))
        int8 = _time(report, "tinyvit_5m", runtime, INT8)
        if int8 and "tinyvit_5m" in found:
            what = f"{runtime}: tinyvit_5m int8 over float32"
            lines.append(_goal(what, int8 / found["tinyvit_5m"], INT8_GOAL))
    return lines


def _goal(what: str, found: float, limit: float) -> str:
    state = "reached" if found <= limit else "missed"
    return f"{what}: {found:.4f}, goal at most {limit:.4f}: {state}"


def _time(report: dict[str, Any], size: str, runtime: str, precision: str) -> float:
    """Return a median in milliseconds; 0 if there is none."""
    for row in report["rows"]:
        if (row["encoder"], row["runtime"], row["precision"]) == (size, runtime, precision):
            return float(row["median_ms"])
    return 0.0


def main(arguments: Sequence[str]) -> int:
    """Measure, and print the goals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the report"
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, metavar="DIR", help="folder of graphs and results"
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="names of encoders")
    parser.add_argument("--prepare-only", action="store_true", help="stop before the times")
    given = parser.parse_args(arguments)
    sizes = given.sizes.split(",")
    unknown = [size for size in sizes if size not in SAM_SIZES]
    if unknown:
        parser.error(f"--sizes names {unknown[0]!r}; accepted: {', '.join(SAM_SIZES)}")
    report = run(
        given.out,
        given.work_dir,
        sizes,
        prepare_only=given.prepare_only,
        progress=lambda step: print(step, file=sys.stderr, flush=True),
    )
    for line in goals(report):
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
