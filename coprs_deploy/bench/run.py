"""One benchmark, from its options to its report."""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec

from coprs_deploy.bench.availability import gpu_name
from coprs_deploy.bench.case import Case, Group
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.measurement import measure_group
from coprs_deploy.bench.options import BenchOptions
from coprs_deploy.bench.process import WorkerError
from coprs_deploy.bench.report import SCHEMA_VERSION, GroupResult, Report, Skipped
from coprs_deploy.bench.suites import DEFAULT_SUITES, SCENE_SUITES, SUITES
from coprs_deploy.machine import machine_record


def run_benchmark(
    options: BenchOptions, progress: Callable[[str], None] = lambda step: None
) -> Report:
    """Select, filter, prepare and measure; ``progress`` is called with the name of each step.

    Raises:
        ValueError: there is no such suite, or no case to measure.
    """
    for name in options.suites:
        if name not in SUITES:
            raise ValueError(f"suite is {name!r}; accepted: {', '.join(SUITES)}, all")
    with ExitStack() as stack:
        if options.work_dir is None:
            scratch = tempfile.TemporaryDirectory(prefix="coprs-bench-")
            folder = Path(stack.enter_context(scratch))
        else:
            folder = options.work_dir
            folder.mkdir(parents=True, exist_ok=True)
        fixtures = Fixtures(folder, options, progress)
        groups, skipped = plan(fixtures)
        if not groups:
            reasons = "; ".join(entry.reason for entry in skipped) or "no suite has a case for it"
            matched = f"--filter {options.filter!r} matches no case" if options.filter else reasons
            raise ValueError(f"there is nothing to measure: {matched}")
        groups = [prepare(group) for group in groups]
        measured = [] if options.prepare_only else groups
        results = (measure_group(group, options, progress) for group in measured)
        return Report(
            schema_version=SCHEMA_VERSION,
            tag=options.tag or fixtures.model.name,
            date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            command=options.command,
            model=fixtures.model.name,
            machine=machine_record(gpu_name()),
            groups=tuple(_without_paths(result, folder) for result in results),
            skipped=_merge(skipped),
        )


def plan(fixtures: Fixtures) -> tuple[list[Group], list[Skipped]]:
    """List the groups of the suites with the cases that the filter matches, and what is skipped.

    Suites that need square scenes have none if the bundle takes others.
    """
    model, groups, skipped = fixtures.model, list[Group](), list[Skipped]()
    for name in fixtures.options.suites or DEFAULT_SUITES:
        if model.variant.aspect_ratio and name in SCENE_SUITES:
            reason = f"its scenes are square, and the bundle is {model.variant.description}"
            skipped.append(Skipped(model.name, reason, suite=name))
            continue
        for entry in SUITES[name](fixtures):
            if isinstance(entry, Skipped):
                skipped.append(msgspec.structs.replace(entry, suite=name))
            elif (group := select(entry, fixtures.options.filter)).cases:
                groups.append(replace(group, suite=name))
    return groups, skipped


def select(group: Group, pattern: str) -> Group:
    """Keep the cases that the filter matches; without its baseline, the first is the baseline."""
    matches = re.compile(pattern).search
    cases = tuple(case for case in group.cases if matches(f"{group.name}: {case.name}"))
    baseline = group.baseline
    if cases and baseline is not None and baseline not in [case.name for case in cases]:
        baseline = cases[0].name
    return replace(group, cases=cases, baseline=baseline)


def prepare(group: Group) -> Group:
    """Make what the cases need; an error of the preparation is the error of the case."""

    def prepared(case: Case) -> Case:
        try:
            made = case.prepare() if case.prepare is not None and not case.error else {}
        except WorkerError as error:
            return replace(case, error=str(error))
        return replace(case, settings={**case.settings, **made})

    return replace(group, cases=tuple(prepared(case) for case in group.cases))


def _without_paths(result: GroupResult, folder: Path) -> GroupResult:
    """Take the paths of this machine out of errors."""

    def clean(error: str) -> str:
        error = error.replace(str(folder), "WORK").replace(str(Path.home()), "~")
        return re.sub(r"/(?:tmp|root|home)/[^\s'\":,]+", "...", error)

    cases = tuple(msgspec.structs.replace(c, error=clean(c.error)) for c in result.cases)
    return msgspec.structs.replace(result, cases=cases)


def _merge(entries: list[Skipped]) -> tuple[Skipped, ...]:
    """Name what several suites skip for one reason once."""
    merged: dict[tuple[str, str], Skipped] = {}
    for entry in entries:
        known = merged.get((entry.name, entry.reason))
        suites = entry.suite if known is None else f"{known.suite}, {entry.suite}"
        merged[entry.name, entry.reason] = msgspec.structs.replace(entry, suite=suites)
    return tuple(merged.values())
