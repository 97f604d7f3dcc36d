"""Conversion and export of SAM's real sizes: time, peak memory and equality.

The weights are random, so the figures are about speed, memory and shape only; a tiny policy stands
in for the real one. Every step runs in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.benchmarks.child import run_cli
from coprs_deploy.benchmarks.machine import describe_machine
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER

NAME = "full-size-export"

MOST_EXPORT_SECONDS = 180
MOST_EXPORT_MEMORY = 1.5
MOST_TOTAL_MEMORY = 3.0
MOST_CONVERT_MEMORY = 2.0
"""Limits that the largest size must keep on two cores; memory in multiples of the weights."""

Progress = Callable[[str], None]


def run(out: Path, sizes: Sequence[str], progress: Progress = lambda step: None) -> dict[str, Any]:
    """Measure each size and write ``full-size-export.json`` and ``.md`` into ``out``.

    Args:
        out: the folder of the report.
        sizes: names of SAM's sizes, as ``vit_b`` and ``vit_h``.
        progress: called with the name of each step as it starts.

    Returns:
        The report.
    """
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix=f"coprs-{size}-") as scratch:
            rows.append(_measure(size, Path(scratch), progress))
    report = {"suite": NAME, "machine": describe_machine(), "weights": "random", "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{NAME}.json", report)
    (out / f"{NAME}.md").write_text(render(report), encoding="utf-8")
    return report


def _measure(size: str, scratch: Path, progress: Progress) -> dict[str, Any]:
    generated, sam_file = scratch / "generated", scratch / f"sam_{size}.pth"
    progress(f"{size}: generate weights")
    run_cli(["convert", "--random", "--sam", size, "--out", str(generated)])
    _write_sam_file(generated, sam_file)
    progress(f"{size}: convert")
    checkpoint, bundle = scratch / "checkpoint", scratch / "bundle"
    policy = ["--policy", str(generated / "policy")]
    converted = run_cli(["convert", *policy, "--sam", str(sam_file), "--out", str(checkpoint)])
    progress(f"{size}: export and check")
    exported = run_cli(["export", str(checkpoint), "--out", str(bundle)])
    result = exported.output
    weights: int = result["weights_bytes"]
    graphs = {path.name: path.stat().st_size for path in sorted(bundle.glob("*.onnx*"))}
    return {
        "sam": size,
        "weights_bytes": weights,
        "convert_seconds": converted.seconds,
        "convert_peak_over_weights": converted.peak_bytes / weights,
        "export_seconds": sum(result["seconds"][f"export {name}"] for name in GRAPH_NAMES),
        "encoder_export_seconds": result["seconds"][f"export {IMAGE_ENCODER}"],
        "export_peak_over_weights": result["peak_bytes_export"] / weights,
        "check_seconds": sum(
            seconds for step, seconds in result["seconds"].items() if step.startswith("check ")
        ),
        "total_peak_over_weights": exported.peak_bytes / weights,
        "files": graphs,
        "equivalence": result["equivalence"],
    }


def _write_sam_file(checkpoint: Path, sam_file: Path) -> None:
    """Write a ``sam_vit_*.pth`` with the weights of a generated checkpoint."""
    import torch
    from safetensors.torch import load_file

    from coprs_deploy.checkpoint import SEGMENTATION_FILE

    tensors = load_file(checkpoint / SEGMENTATION_FILE)
    torch.save({n: t for n, t in tensors.items() if not n.startswith("prior.")}, sam_file)


def render(report: dict[str, Any]) -> str:
    """Write the report for people, in Markdown."""
    lines = [
        "# Full-size conversion and export",
        "",
        "SAM's real sizes with **random weights**: speed, memory and shape only. Made by",
        f"`coprs-deploy bench --suite {NAME} --out docs/reports`.",
        "",
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()) + ".",
        "",
        "Memory is the peak of the whole process, in multiples of the float32 weights.",
        "",
        "| | weights | convert | memory | export, 3 graphs | memory | check | memory with check |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['sam']} | {row['weights_bytes'] / 1e6:,.0f} MB "
            f"| {row['convert_seconds']:.0f} s "
            f"| {row['convert_peak_over_weights']:.2f} x | {row['export_seconds']:.0f} s "
            f"| {row['export_peak_over_weights']:.2f} x | {row['check_seconds']:.0f} s "
            f"| {row['total_peak_over_weights']:.2f} x |"
        )
    lines += [
        "",
        f"Limits for ViT-H on two cores: convert {MOST_CONVERT_MEMORY:g} x; export "
        f"{MOST_EXPORT_SECONDS} s and {MOST_EXPORT_MEMORY:g} x; with the check "
        f"{MOST_TOTAL_MEMORY:g} x. A smaller size pays the fixed cost of the libraries "
        "(about 0.5 GB) against smaller weights.",
        "",
        "## Equality with PyTorch in float32",
        "",
        "Worst of the inputs: relative is the largest difference over the largest value.",
        "",
        "| | graph | max abs | relative | cosine | mask IoU |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        for record in row["equivalence"]:
            iou = "" if record["mask_iou"] is None else f"{record['mask_iou']:.5f}"
            lines.append(
                f"| {row['sam']} | {record['graph']} | {record['max_abs_error']:.1e} "
                f"| {record['relative']:.1e} | {record['cosine']:.9f} | {iou} |"
            )
    return "\n".join(lines) + "\n"


def failures(report: dict[str, Any]) -> list[str]:
    """Say which limits the ViT-H row does not keep; empty when all are kept."""
    found = []
    for row in report["rows"]:
        if row["sam"] != "vit_h":
            continue
        for key, most in (
            ("convert_peak_over_weights", MOST_CONVERT_MEMORY),
            ("export_seconds", MOST_EXPORT_SECONDS),
            ("export_peak_over_weights", MOST_EXPORT_MEMORY),
            ("total_peak_over_weights", MOST_TOTAL_MEMORY),
        ):
            if row[key] > most:
                found.append(f"{row['sam']}: {key} is {row[key]:.2f}, the limit is {most:g}")
    return found
