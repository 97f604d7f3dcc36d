"""Engines of SAM's real image encoders, on a machine without a GPU: accuracy, time, memory, size.

The weights are random. Each graph is compared with PyTorch on the CPU, every rounding written out,
and compiled with TensorRT for RTX; every step runs in a process of its own, and a step that is done
is not done again in the same work folder.

    python -m coprs_deploy.benchmarks.full_size_engines --out docs/reports --work DIR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.benchmarks.machine import describe_machine
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.machine import installed_versions
from coprs_deploy.specs import IMAGE_ENCODER

NAME = "full-size-engines"
SIZES = ("vit_b", "vit_l", "vit_h")
PRECISIONS = ("bf16", "fp16")
"""By default; int8 is calibrated for minutes first."""
GPUS = ("sm_80", "sm_89", "sm_120")
RUNTIME = "tensorrt-rtx"
VERSIONS = (RUNTIME, "torch", "onnx", "onnxruntime")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        sizes: names of SAM's sizes.
        precisions: as in ``--precision``.
        prepares_only: whether to stop before the builds, whose times want an idle machine.
    """

    sizes: Sequence[str] = SIZES
    precisions: Sequence[str] = PRECISIONS
    prepares_only: bool = False


def run(
    out: Path, work: Path, plan: Plan | None = None, progress: Progress = lambda step: None
) -> dict[str, Any]:
    """Measure and write ``full-size-engines.json`` and ``.md`` into ``out``.

    Args:
        out: the folder of the report.
        work: a folder for weights, graphs and the results of steps, some 15 GB with ViT-H.
        plan: what is measured.
        progress: called with the name of each step as it starts.

    Returns:
        The report.
    """
    plan = plan or Plan()
    rows = []
    for size in plan.sizes:
        folder = work / size
        folder.mkdir(parents=True, exist_ok=True)
        for precision in plan.precisions:
            rows.append(_measure(size, precision, folder, plan, progress))
    installed = installed_versions()
    report = {
        "suite": NAME,
        "machine": describe_machine(),
        "versions": {name: installed[name] for name in VERSIONS if name in installed},
        "weights": "random",
        "gpus": list(GPUS),
        "rows": rows,
    }
    if not plan.prepares_only:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{NAME}.json", report)
        (out / f"{NAME}.md").write_text(render(report), encoding="utf-8")
    return report


def _measure(
    size: str, precision: str, folder: Path, plan: Plan, progress: Progress
) -> dict[str, Any]:
    checkpoint = str(folder / "checkpoint")
    graphs = folder / precision
    graphs.mkdir(exist_ok=True)
    graph = str(graphs / "image_encoder.onnx")

    def step(name: str, place: Path, **settings: Any) -> dict[str, Any]:
        progress(f"{size} {precision}: {name}")
        return _run_step(name, place / f"{name}.json", {"checkpoint": checkpoint, **settings})

    made = step("checkpoint", folder, size=size)
    step("reference", folder, folder=str(folder))
    exported = step("export", graphs, graph=graph, precision=precision)
    checked = step("check", graphs, graph=graph, folder=str(folder), precision=precision)
    row = {
        "sam": size,
        "precision": precision,
        "weights_bytes": made["weights_bytes"],
        "graph_bytes": exported["graph_bytes"],
        "cosine": checked["cosine"],
        "relative": checked["relative"],
    }
    if not plan.prepares_only:
        built = step("build", graphs, graph=graph, gpus=list(GPUS))
        row |= {key: built[key] for key in ("build_seconds", "engine_bytes", "network_layers")}
        row |= {"build_peak_bytes": built["peak_bytes"], "tensor_types": built["tensor_types"]}
    return row


def _run_step(name: str, kept: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a step in a process of its own, or read what it gave before.

    Raises:
        RuntimeError: it did not exit with 0; its errors are on our stderr.
    """
    if not kept.exists():
        command = [sys.executable, "-m", "coprs_deploy.benchmarks.engine_steps", name]
        done = subprocess.run(
            [*command, json.dumps(settings)], stdout=subprocess.PIPE, check=False, text=True
        )
        if done.returncode:
            raise RuntimeError(f"step {name} ended with exit code {done.returncode}")
        write_json(kept, json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return result


def render(report: dict[str, Any]) -> str:
    """Write the report for people, in Markdown."""
    lines = [
        "# Engines of the full-size image encoders",
        "",
        "SAM's real image encoders with **random weights**, compiled with TensorRT for RTX for "
        f"{', '.join(report['gpus'])} at once, on a machine without a GPU. Made by",
        f"`python -m coprs_deploy.benchmarks.{NAME.replace('-', '_')} --out docs/reports "
        "--work DIR`.",
        "",
        ", ".join(
            f"{key} {value}" for key, value in (report["machine"] | report["versions"]).items()
        )
        + ".",
        "",
        "Cosine and relative difference are of the embedding of one picture, the typed graph with "
        "every rounding written out against PyTorch in float32. Memory is the peak of the process "
        "that builds.",
        "",
        "| | precision | graph | cosine | relative | build | memory | over graph | engine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        over = row["build_peak_bytes"] / row["graph_bytes"]
        lines.append(
            f"| {row['sam']} | {row['precision']} | {row['graph_bytes'] / 1e6:,.0f} MB "
            f"| {row['cosine']:.7f} | {row['relative']:.1e} | {row['build_seconds']:.1f} s "
            f"| {row['build_peak_bytes'] / 1e6:,.0f} MB | {over:.1f} x "
            f"| {row['engine_bytes'] / 1e6:,.0f} MB |"
        )
    lines += ["", "No engine of this table has run."]
    return "\n".join(lines) + "\n"


def failures(report: dict[str, Any]) -> list[str]:
    """Say which graphs are outside the tolerance of their precision; empty when none is."""
    found = []
    for row in report["rows"]:
        allowed = TOLERANCES[RUNTIME, row["precision"]][IMAGE_ENCODER]
        if not (row["cosine"] >= allowed.cosine and row["relative"] <= allowed.relative):
            found.append(
                f"{row['sam']} {row['precision']}: cosine {row['cosine']:.7f}, relative "
                f"{row['relative']:.1e} (allowed: {allowed.cosine}, {allowed.relative:.0e})"
            )
    return found


def main() -> int:
    """Measure from the command line; exit code 1 when a graph is outside its tolerance."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--prepare", action="store_true", help="stop before the builds")
    given = parser.parse_args()
    plan = Plan(given.sizes.split(","), given.precisions.split(","), given.prepare)
    report = run(given.out, given.work, plan, lambda step: print(step, file=sys.stderr, flush=True))
    failed = failures(report)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
