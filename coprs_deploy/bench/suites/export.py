"""Conversions and exports with all checks and engine builds: time, peak memory, size on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprs_deploy.bench.availability import missing_builders, runtime_version
from coprs_deploy.bench.case import Case, Group, SuitePlan, Workload
from coprs_deploy.bench.fixtures import PREPARE_TIMEOUT_S, Fixtures, Model
from coprs_deploy.bench.preparation import export_bundle
from coprs_deploy.bench.report import Report, Skipped
from coprs_deploy.bench.suites import labels_of
from coprs_deploy.checkpoint import POLICY_DIRECTORY, SEGMENTATION_FILE
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.machine import peak_memory_bytes

NAME = "export"
SUMMARY = "conversions, exports and engine builds: time, peak memory, size"

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


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List a conversion of SAM's real sizes, and an export for each runtime and precision."""
    groups, skipped = [], missing_builders(NAME, fixtures.options.devices)
    missing = {entry.name for entry in skipped}
    for model in fixtures.models():
        if model.checkpoint is None:
            reason = "an export needs a checkpoint; name it with --checkpoint"
            skipped.append(Skipped(NAME, model.name, reason))
            continue
        kinds = [kind for kind in TOLERANCES if kind[0] not in missing]
        cases = [_conversion(fixtures, model)] if model.is_random else []
        cases += [_export(fixtures, model, *kind) for kind in kinds]
        name, unit = f"{model.name}: export", "one export"
        timeout_s = PREPARE_TIMEOUT_S
        group = Group(NAME, name, tuple(cases), unit=unit, runs=1, timeout_s=timeout_s)
        groups.append(group)
    return SuitePlan(tuple(groups), tuple(skipped))


def _conversion(fixtures: Fixtures, model: Model) -> Case:
    def prepare() -> dict[str, str]:
        name, checkpoint = f"sam_{model.name}.pth", model.checkpoint
        sam = fixtures.make(name, "write_sam_weights", checkpoint=checkpoint)
        out = fixtures.folder / f"{model.name}-converted"
        return {"checkpoint": str(checkpoint), "sam": str(sam), "out": str(out)}

    target, labels = "coprs_deploy.bench.suites.export:open_conversion", labels_of(model, CONVERT)
    return Case("convert, policy and sam_vit file", target, {}, labels, prepare, ALONE)


def _export(fixtures: Fixtures, model: Model, runtime: str, precision: str) -> Case:
    without_gpu = runtime in TRT_VARIANTS and TRT_VARIANTS[runtime].builds_without_gpu
    gpus = COMPUTE_CAPABILITIES if without_gpu else ()
    name = f"export, {runtime} {runtime_version(runtime)} {precision}"
    name += f" for {', '.join(gpus)}" if gpus else ""
    out = fixtures.folder / f"exported-{model.name}-{runtime}-{precision}"
    settings: dict[str, Any] = {"checkpoint": str(model.checkpoint), "out": str(out)}
    settings |= {"runtime": runtime, "precision": precision, "compute_capabilities": gpus}

    def prepare() -> dict[str, Any]:
        is_int8 = precision == "int8"
        return {"calibration": fixtures.calibration(model, model.variant) if is_int8 else None}

    target, labels = "coprs_deploy.bench.suites.export:open_export", (model, runtime, precision)
    return Case(name, target, settings, labels_of(*labels), prepare, ALONE)


def limit_violations(report: Report) -> list[str]:
    """List the limits that the cases of ViT-H exceed; empty when all are kept."""
    cases = [case for group in report.groups if group.suite == NAME for case in group.cases]
    return [
        f"vit_h, {case.name}: {metric} is {case.metrics[metric]:.2f}, the limit is {limit:g}"
        for case in cases
        if case.labels["model"] == "vit_h" and case.labels.get("precision", "fp32") == "fp32"
        for metric, limit in LIMITS.get(case.labels["runtime"], {}).items()
        if case.metrics.get(metric, 0) > limit
    ]


def open_export(**arguments: Any) -> Workload:
    """Open an export; each run makes the bundle again."""
    return _Export(arguments)


class _Export(Workload):
    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments, self._made = arguments, dict[str, Any]()

    def run(self) -> Mapping[str, float]:
        self._made = export_bundle(**self._arguments)
        metrics = self._made["metrics"]
        steps = (name for name in ("export", "check", "build") if f"{name}_s" in metrics)
        return {name: 1e3 * metrics[f"{name}_s"] for name in steps}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        return self._made


def open_conversion(checkpoint: str, sam: str, out: str) -> Workload:
    """Open a conversion of a checkpoint's policy and a ``sam_vit_*.pth`` file."""
    return _Conversion(Path(checkpoint), sam, out)


class _Conversion(Workload):
    def __init__(self, checkpoint: Path, sam: str, out: str) -> None:
        self._checkpoint, self._files = checkpoint, (sam, out)

    def run(self) -> Mapping[str, float]:
        from coprs_deploy.conversion import ConversionOptions, checkpoint_from_policy_and_sam

        policy, options = self._checkpoint / POLICY_DIRECTORY, ConversionOptions(overwrite=True)
        checkpoint_from_policy_and_sam(policy, *self._files, options)
        return {}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        peak, weights = peak_memory_bytes(), (self._checkpoint / SEGMENTATION_FILE).stat().st_size
        return {"metrics": {"peak_bytes": float(peak), "peak_over_weights": peak / weights}}
