"""Exports with all their checks and builds: time, peak memory, size on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coprs_deploy.benchmarks.case import Case, Group, Plan, Subject
from coprs_deploy.benchmarks.process import WorkerError
from coprs_deploy.benchmarks.report import LeftOut
from coprs_deploy.benchmarks.workshop import PREPARE_SECONDS, Workshop, version_of
from coprs_deploy.bundle import TRT_VARIANT_NAMES
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import MissingDependencyError
from coprs_deploy.export.tolerances import TOLERANCES

NAME = "export"
SUMMARY = "exports and engine builds: time, peak memory, size"

GPUS = ("sm_80", "sm_89", "sm_120")
"""What engines are built for where the build needs no GPU."""


def plan(workshop: Workshop) -> Plan:
    """Plan an export for each runtime and precision that can be made here."""
    groups, left_out = [], []
    unavailable = dict(_unavailable(workshop))
    for name, reason in unavailable.items():
        left_out.append(LeftOut(NAME, name, reason))
    for model in workshop.models():
        if model.checkpoint is None:
            reason = "an export starts from a checkpoint; name it with --checkpoint"
            left_out.append(LeftOut(NAME, model.name, reason))
            continue
        cases = []
        for runtime, precision in TOLERANCES:
            if runtime in unavailable:
                continue
            gpus = (
                GPUS if runtime in TRT_VARIANTS and TRT_VARIANTS[runtime].builds_without_gpu else ()
            )
            calibration, problem = None, ""
            if precision == "int8":
                try:
                    calibration = workshop.calibration(model)
                except WorkerError as error:
                    problem = str(error)
            version = version_of(
                runtime, "onnxruntime-gpu" if runtime == "onnxruntime" else runtime
            )
            where = f" for {', '.join(gpus)}" if gpus else ""
            cases.append(
                Case(
                    name=f"export, {runtime} {version} {precision}{where}",
                    target=f"{__name__}:open_export",
                    settings={
                        "checkpoint": str(model.checkpoint),
                        "out": str(
                            workshop.folder / f"exported-{model.name}-{runtime}-{precision}"
                        ),
                        "runtime": runtime,
                        "precision": precision,
                        "gpus": list(gpus),
                        "calibration": calibration,
                    },
                    labels={"model": model.name, "runtime": runtime, "precision": precision},
                    problem=problem,
                    estimated_bytes=1 << 60,  # one after the other, each alone
                )
            )
        kept = tuple(case for case in cases if workshop.wants(f"{model.name}: export", case.name))
        if kept:
            groups.append(
                Group(
                    suite=NAME,
                    name=f"{model.name}: export",
                    cases=kept,
                    unit="one export",
                    runs=1,
                    limit_seconds=PREPARE_SECONDS,
                )
            )
    return Plan(tuple(groups), tuple(left_out))


def _unavailable(workshop: Workshop) -> list[tuple[str, str]]:
    found = []
    for name in TRT_VARIANT_NAMES:
        try:
            TRT_VARIANTS[name].load()
        except MissingDependencyError as error:
            found.append((name, str(error)))
            continue
        if not TRT_VARIANTS[name].builds_without_gpu and "cuda" not in workshop.devices:
            found.append((name, "it builds on the GPU that runs the engine, and there is none"))
    return found


def open_export(
    checkpoint: str,
    out: str,
    runtime: str,
    precision: str,
    *,
    gpus: list[str],
    calibration: str | None,
) -> Subject:
    """Open an export; a run makes the bundle anew."""
    return _Export(
        checkpoint=checkpoint,
        out=out,
        runtime=runtime,
        precision=precision,
        gpus=tuple(gpus),
        calibration=calibration,
    )


class _Export(Subject):
    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._made: dict[str, Any] = {}

    def run(self) -> Mapping[str, float]:
        """Export."""
        from coprs_deploy.benchmarks.steps import export_bundle

        self._made = export_bundle(**self._arguments)
        figures = self._made["figures"]
        stages = {"export": figures["export_s"], "check": figures["check_s"]}
        if "build_s" in figures:
            stages["build"] = figures["build_s"]
        return {name: 1e3 * seconds for name, seconds in stages.items()}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Say what was measured against PyTorch, and what it took."""
        by_graph = self._made["equality"]
        end = by_graph["end_to_end"]
        accuracy = {
            "inputs": end["inputs"],
            "embedding_cosine": by_graph["image_encoder"]["cosine"],
            "prior_error": by_graph["prior"]["relative"],
            "mask_error": end["relative"],
            "mask_iou_worst": end["mask_iou"],
            "note": "the export's own check, random concentrations; worst of its inputs",
        }
        return {"figures": self._made["figures"], "accuracy": accuracy}
