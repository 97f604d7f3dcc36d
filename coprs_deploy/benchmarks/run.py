"""One benchmark from its request to its report."""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from coprs_deploy.benchmarks.case import Plan
from coprs_deploy.benchmarks.machine import machine_record
from coprs_deploy.benchmarks.measurement import Measurement, Settings
from coprs_deploy.benchmarks.process import WorkerError, call_once
from coprs_deploy.benchmarks.report import SCHEMA_VERSION, Ceilings, GroupResult, LeftOut, Report
from coprs_deploy.benchmarks.roofline import TORCH_TYPES
from coprs_deploy.benchmarks.suites import DEFAULT_SUITES, Suite, suite
from coprs_deploy.benchmarks.workshop import Model, Workshop, shipped_model
from coprs_deploy.export.precision import FP32

SCENE_SUITES = ("answer", "start", "scaling")
"""Suites whose rows ask about generated scenes."""

CEILING_SECONDS = 90.0
"""Limit for the products of one precision and the copy, start of the libraries included."""


@dataclass(frozen=True)
class Request:
    """What shall be measured, and how.

    Attributes:
        model: the bundle in question.
        suites: names of suites.
        sizes: SAM sizes that are measured with random weights as well.
        devices: ``cpu``, ``cuda``.
        only: a regular expression that group and name of a row must hold.
        calibration: folder of pictures for int8.
        is_quick: whether suites leave out what takes long: lower precisions on a CPU, single small
            graphs, some of the repetitions.
        theme: a word for the files.
        command: what makes the report again, in words.
        settings: how rows are measured.
        work: folder of what is prepared, kept for the next time; None takes one that is removed.
        prepare_only: whether to stop when everything is prepared.
    """

    model: Model = field(default_factory=shipped_model)
    suites: tuple[str, ...] = DEFAULT_SUITES
    sizes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    only: str = ""
    calibration: Path | None = None
    is_quick: bool = False
    theme: str = "shipped"
    command: str = "coprs-deploy bench"
    settings: Settings = field(default_factory=Settings)
    work: Path | None = None
    prepare_only: bool = False


def run_benchmark(request: Request, progress: Callable[[str], None] = lambda step: None) -> Report:
    """Prepare and measure.

    Args:
        request: what and how.
        progress: called with the name of each step as it starts.

    Raises:
        ValueError: a suite does not exist, or nothing is left to measure.
    """
    planners = [suite(name) for name in request.suites]
    with ExitStack() as stack:
        if request.work is None:
            scratch = tempfile.TemporaryDirectory(prefix="coprs-bench-")
            folder = Path(stack.enter_context(scratch))
        else:
            folder = request.work
            folder.mkdir(parents=True, exist_ok=True)
        workshop = stack.enter_context(
            Workshop(
                folder,
                request.model,
                sizes=request.sizes,
                devices=request.devices,
                only=request.only,
                calibration=request.calibration,
                is_quick=request.is_quick,
                progress=progress,
            )
        )
        plans = [_plan(planner, workshop) for planner in planners]
        groups = [group for plan in plans for group in plan.groups]
        if request.prepare_only:
            groups = []
        elif not groups:
            raise ValueError(
                "there is nothing to measure: "
                + (f"--only {request.only!r} fits no row" if request.only else _why(plans))
            )
        used = {c.products for g in groups for c in g.cases if c.work}
        ceilings = measure_all_ceilings(request.devices, used | {FP32}, progress) if used else ()
        by_device = {ceiling.device: ceiling for ceiling in ceilings}
        measurement = Measurement(request.settings, by_device, progress)
        results = tuple(_scrub(measurement.measure(group), folder) for group in groups)
    return Report(
        schema_version=SCHEMA_VERSION,
        theme=request.theme,
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        command=request.command,
        model=request.model.name,
        machine=machine_record(),
        ceilings=ceilings,
        groups=results,
        left_out=_merge([entry for plan in plans for entry in plan.left_out]),
    )


def _plan(planner: Suite, workshop: Workshop) -> Plan:
    """Plan a suite, unless it asks about scenes that the bundle does not take."""
    if not workshop.model.form.aspect_ratio or planner.NAME not in SCENE_SUITES:
        return planner.plan(workshop)
    reason = f"it asks about square scenes, and the bundle is {workshop.model.form.pictures}"
    return Plan((), (LeftOut(planner.NAME, workshop.model.name, reason),))


def measure_all_ceilings(
    devices: Sequence[str], precisions: Collection[str], progress: Callable[[str], None]
) -> tuple[Ceilings, ...]:
    """Measure what each device reaches at best, in these precisions."""
    found = []
    for device in devices:
        flops: dict[str, float] = {}
        problems: dict[str, str] = {}
        copies = [0.0]
        for precision in TORCH_TYPES:
            if precision not in precisions:
                continue
            progress(f"ceilings of {device}, {precision}")
            try:
                rates = call_once(
                    "coprs_deploy.benchmarks.roofline:measure_ceilings",
                    CEILING_SECONDS,
                    device=device,
                    precision=precision,
                )
            except WorkerError as error:
                problems[precision] = str(error)
                continue
            flops[precision] = float(f"{rates['flops']:.4g}")
            copies.append(float(f"{rates['bytes']:.4g}"))
        found.append(Ceilings(device.partition(":")[0], flops, max(copies), problems))
    return tuple(found)


def _scrub(result: GroupResult, folder: Path) -> GroupResult:
    """Take the paths of this machine out of reasons."""
    import msgspec

    def clean(reason: str) -> str:
        reason = reason.replace(str(folder), "WORK").replace(str(Path.home()), "~")
        return re.sub(r"/(?:tmp|root|home)/[^\s'\":,]+", "...", reason)

    rows = tuple(msgspec.structs.replace(row, reason=clean(row.reason)) for row in result.rows)
    return msgspec.structs.replace(result, rows=rows)


def _merge(entries: list[LeftOut]) -> tuple[LeftOut, ...]:
    """Name what several suites leave out for one reason once."""
    merged: dict[tuple[str, str], LeftOut] = {}
    for entry in entries:
        known = merged.get((entry.name, entry.reason))
        suites = entry.suite if known is None else f"{known.suite}, {entry.suite}"
        merged[entry.name, entry.reason] = LeftOut(suites, entry.name, entry.reason, entry.remedy)
    return tuple(merged.values())


def _why(plans: Sequence[object]) -> str:
    reasons = [e.reason for plan in plans for e in getattr(plan, "left_out", ())]
    return "; ".join(reasons) or "no suite has a row for this bundle"


def devices_here() -> tuple[str, ...]:
    """Name the devices that rows can run on."""
    from coprs_deploy.engines.cuda import current_gpu

    return ("cpu",) if current_gpu() is None else ("cpu", "cuda")
