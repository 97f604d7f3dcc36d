"""Conversions and exports with all checks and engine builds: time, peak memory, size on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import (
    PREPARE_TIMEOUT_S,
    Fixtures,
    Model,
    missing_builders,
    runtime_version,
)
from coprs_deploy.bench.report import Report, Skipped
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.export.tolerances import TOLERANCES

TARGET = "coprs_deploy.bench.worker:FunctionWorkload"

PREPARATION = "coprs_deploy.bench.preparation"

COMPUTE_CAPABILITIES = ("sm_80", "sm_89", "sm_120")
"""GPUs that engines are built for where the build needs none."""

ALONE = 1 << 60
"""Estimated memory of a case that is open alone."""

CONVERT = "convert"
LIMITS = {
    CONVERT: {"peak_over_weights": 2.0},
    "onnxruntime": {"export_s": 180, "export_peak_over_weights": 1.5, "peak_over_weights": 3.0},
}
"""Limits of ViT-H in float32 on two cores: seconds, and peak memory in multiples of the weights. A
smaller size pays the fixed cost of the libraries (about 0.5 GB) against smaller weights."""


def plan(fixtures: Fixtures) -> Planned:
    """Plan a conversion of SAM's real sizes, and an export for each runtime and precision."""
    skipped = missing_builders(fixtures.options.devices)
    yield from skipped
    missing = {entry.name for entry in skipped}
    for model in fixtures.models():
        if model.checkpoint is None:
            yield Skipped(model.name, "an export needs a checkpoint; name it with --checkpoint")
            continue
        kinds = [kind for kind in TOLERANCES if kind[0] not in missing]
        cases = [_conversion(fixtures, model)] if model.is_random else []
        cases += [_export(fixtures, model, *kind) for kind in kinds]
        name, limit = f"{model.name}: export", PREPARE_TIMEOUT_S
        yield Group(name, tuple(cases), unit="one export", runs=1, timeout_s=limit)


def _conversion(fixtures: Fixtures, model: Model) -> Case:
    def prepare() -> dict[str, Any]:
        checkpoint, name = fixtures.weights(model), f"sam_{model.name}.pth"
        sam = fixtures.make("write_sam_weights", name, checkpoint=checkpoint)
        return {"checkpoint": checkpoint, "sam": sam, "out": fixtures.folder / "converted"}

    function, labels = {"function": f"{PREPARATION}:convert"}, model.labels(CONVERT)
    return Case("convert, policy and sam_vit file", TARGET, function, labels, prepare, ALONE)


def _export(fixtures: Fixtures, model: Model, runtime: str, precision: str) -> Case:
    without_gpu = runtime in TRT_VARIANTS and TRT_VARIANTS[runtime].builds_without_gpu
    gpus = COMPUTE_CAPABILITIES if without_gpu else ()
    name = f"export, {runtime} {runtime_version(runtime)} {precision}"
    name += f" for {', '.join(gpus)}" if gpus else ""

    def prepare() -> dict[str, Any]:
        options = fixtures.export_options(model, runtime, precision)
        options = replace(options, compute_capabilities=gpus)
        out = fixtures.folder / "exported"
        return {"checkpoint": fixtures.weights(model), "out": out, "options": options}

    function, labels = {"function": f"{PREPARATION}:export_bundle"}, (runtime, precision)
    return Case(name, TARGET, function, model.labels(*labels), prepare, ALONE)


def limit_violations(report: Report) -> list[str]:
    """List the limits that the cases of ViT-H exceed; empty when all are kept."""
    cases = [case for group in report.groups if group.suite == "export" for case in group.cases]
    return [
        f"vit_h, {case.name}: {metric} is {case.metrics[metric]:.2f}, the limit is {limit:g}"
        for case in cases
        if case.labels["model"] == "vit_h" and case.labels.get("precision", "fp32") == "fp32"
        for metric, limit in LIMITS.get(case.labels["runtime"], {}).items()
        if case.metrics.get(metric, 0) > limit
    ]
