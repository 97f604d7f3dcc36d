"""One benchmark, from its options to its report: planning, preparation, interleaved rounds.

The cases of a group are open side by side in a worker process each, and all but one are stopped, so
that none takes another one's time. Where their memory does not fit, each is opened again in every
round.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coprs_deploy.artifacts import temporary_directory
from coprs_deploy.bench import graph_suites, request_suites
from coprs_deploy.bench.case import TOTAL, BenchOptions, Case, Group, Planned, Progress
from coprs_deploy.bench.fixtures import Fixtures, gpu_name, shape_words
from coprs_deploy.bench.report import (
    SCHEMA_VERSION,
    Accuracy,
    CaseResult,
    GroupResult,
    Memory,
    Report,
    Skipped,
    is_stable,
    ratio_of_rounds,
    rounded,
    summarize_runs,
)
from coprs_deploy.bench.worker import Worker, WorkerError
from coprs_deploy.machine import machine_record

SUITES: Mapping[str, Callable[[Fixtures], Planned]] = {
    "engines": graph_suites.engines_suite,
    "answer": request_suites.answer_suite,
    "latency": request_suites.latency_suite,
    "policy": request_suites.policy_suite,
    "start": request_suites.start_suite,
    "scaling": request_suites.scaling_suite,
    "export": graph_suites.export_suite,
    "precision": graph_suites.precision_suite,
}
"""Function of each suite, by the name that users type."""

DEFAULT_SUITES = ("engines", "answer", "start")
"""What runs without ``--suite``: within three minutes for the demo model on two idle cores."""

SCENE_SUITES = ("answer", "latency", "start", "scaling")
"""Suites with requests on generated scenes, which are square."""

CHECKPOINT_SUITES = ("policy", "export", "precision")
"""Suites that need the weights of the requested model."""

SHORT_RUN_MS = 200
"""Shorter runs are preceded by an unmeasured one in every round."""

STABLE_WITHIN = 0.03
"""Half-width of the median's 95 % interval that counts as stable, as a share."""

MAX_RUNS = 1000
"""Largest number of runs of a case in one round."""

MAX_COUNTED_ROUNDS = 3
"""Largest number of rounds of a group whose number of runs is given."""


def run_benchmark(options: BenchOptions, progress: Progress, note: Progress) -> Report:
    """Select, filter, prepare and measure.

    ``progress`` is called with the name of each step, ``note`` with a line that announces them.

    Raises:
        ValueError: there is no such suite, or no case to measure.
    """
    for name in options.suites:
        if name not in SUITES:
            raise ValueError(f"suite is {name!r}; accepted: {', '.join(SUITES)}, all")
    with temporary_directory("coprs-bench-") as scratch:
        folder = options.work_dir or scratch
        folder.mkdir(parents=True, exist_ok=True)
        fixtures = Fixtures(folder, options, progress)
        groups, skipped = list_groups(fixtures)
        if not groups:
            reasons = "; ".join(entry.reason for entry in skipped) or "no suite has a case for it"
            matched = f"--filter {options.filter!r} matches no case" if options.filter else reasons
            raise ValueError(f"there is nothing to measure: {matched}")
        note(announcement(groups, fixtures))
        groups = [prepare(group) for group in groups]
        results = [measure_group(g, options, progress) for g in groups if not options.prepare_only]
        return Report(
            schema_version=SCHEMA_VERSION,
            tag=options.tag or fixtures.model.name,
            date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            command=options.command,
            model=fixtures.model.name,
            machine=machine_record(gpu_name()),
            groups=tuple(_without_paths(result, folder) for result in results),
            skipped=tuple(skipped),
        )


def list_groups(fixtures: Fixtures) -> tuple[list[Group], list[Skipped]]:
    """List the groups of the suites with the cases that the filter matches, and what is skipped.

    Suites that need square scenes or weights have none if the bundle has none.
    """
    model, groups, skipped = fixtures.model, list[Group](), dict[tuple[str, str], Skipped]()
    for name in fixtures.options.suites or DEFAULT_SUITES:
        reason = ""
        if model.variant.aspect_ratio and name in SCENE_SUITES:
            reason = f"its scenes are square, and the bundle is {shape_words(model.variant)}"
        elif model.checkpoint is None and name in CHECKPOINT_SUITES:
            reason = "it is measured from a checkpoint; name it with --checkpoint"
        planned = iter([Skipped(model.name, reason)]) if reason else SUITES[name](fixtures)
        for entry in planned:
            if isinstance(entry, Group):
                groups.append(replace(select(entry, fixtures.options.filter), suite=name))
            else:  # what several suites skip for one reason is named once
                key = (entry.name, entry.reason)
                suites = f"{skipped[key].suite}, {name}" if key in skipped else name
                skipped[key] = msgspec.structs.replace(entry, suite=suites)
    return [group for group in groups if group.cases], list(skipped.values())


def select(group: Group, pattern: str) -> Group:
    """Keep the cases that the filter matches; without its baseline, the first is the baseline."""
    matches = re.compile(pattern).search
    cases = [case for case in group.cases if matches(f"{group.name}: {case.name}")]
    has_baseline = group.baseline in [None, *(case.name for case in cases)] or not cases
    return replace(group, cases=cases, baseline=group.baseline if has_baseline else cases[0].name)


def prepare(group: Group) -> Group:
    """Make what the cases need; an error of the preparation is the error of the case."""
    cases = []
    for case in group.cases:
        try:
            made = {name: v() if callable(v) else v for name, v in case.settings.items()}
            cases.append(replace(case, settings=made))
        except WorkerError as error:
            cases.append(replace(case, error=str(error)))
    return replace(group, cases=cases)


def announcement(groups: Sequence[Group], fixtures: Fixtures) -> str:
    """Say what is measured, what is prepared for it, and how long that takes at least."""
    options = fixtures.options
    runs = [group.runs for group in groups for _ in group.cases]
    seconds = runs.count(None) * (options.min_time_s + options.warmup_s)
    text = f"{len(runs)} cases, measured for {seconds:.0f} s or more"
    pending = fixtures.pending(lambda: [prepare(group) for group in groups])
    if not pending:
        return text
    text += f"; to prepare, about {sum(pending.values()):.0f} s on two idle cores: "
    kept = "" if options.work_dir else " (--work-dir DIR keeps it for the next run)"
    return text + ", ".join(pending).replace(f" {fixtures.model.fingerprint}", "") + kept


def _without_paths(result: GroupResult, folder: Path) -> GroupResult:
    """Take the paths of this machine out of errors."""

    def clean(error: str) -> str:
        error = error.replace(str(folder), "WORK").replace(str(Path.home()), "~")
        return re.sub(r"/(?:tmp|root|home)/[^\s'\":,]+", "...", error)

    cases = tuple(msgspec.structs.replace(c, error=clean(c.error)) for c in result.cases)
    return msgspec.structs.replace(result, cases=cases)


@dataclass
class _Running:
    """A case while it is measured."""

    case: Case
    error: str
    worker: Worker | None = None
    rounds: list[list[dict[str, float]]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    host_bytes: list[int] = field(default_factory=list)
    device_bytes: list[int] = field(default_factory=list)

    def milliseconds(self) -> list[list[float]]:
        """Return the runs by round."""
        return [[run[TOTAL] for run in runs] for runs in self.rounds]

    def call(self, action: str, timeout_s: float, **settings: Any) -> dict[str, Any]:
        """Open, run or finish the workload."""
        assert self.worker is not None
        target = f"coprs_deploy.bench.worker:{action}_workload"
        response: dict[str, Any] = self.worker.call(target, timeout_s, **settings)
        return response

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure_group(group: Group, options: BenchOptions, progress: Progress) -> GroupResult:
    """Measure the prepared cases of a group; failed cases are reported with their error."""
    measurement = _Measurement(group, options, progress)
    try:
        measurement.run()
    finally:
        for running in measurement.cases:
            running.close()
    return measurement.result()


class _Measurement:
    """One group being measured."""

    def __init__(self, group: Group, options: BenchOptions, progress: Progress) -> None:
        self.cases = [_Running(case, case.error) for case in group.cases]
        self._group, self._options, self._progress = group, options, progress
        self._alive = [running for running in self.cases if not running.error]
        needed = sum(running.case.estimated_bytes for running in self._alive)
        self._side_by_side = needed <= options.max_memory_bytes or len(self._alive) == 1
        self._timeout = group.timeout_s or options.case_timeout_s
        self._min_rounds, self._max_rounds = options.rounds, options.max_rounds
        if group.runs is not None:
            self._min_rounds = self._max_rounds = min(
                MAX_COUNTED_ROUNDS, options.rounds, group.runs
            )
        if not self._side_by_side:
            self._max_rounds = self._min_rounds

    def run(self) -> None:
        """Run all rounds, each beginning with another case, and then measure accuracy."""
        for number in range(self._max_rounds if self._alive else 0):
            stable = (r.error or is_stable(r.milliseconds(), STABLE_WITHIN) for r in self._alive)
            if self._side_by_side and number >= self._min_rounds and all(stable):
                break
            first, is_last = number % len(self._alive), number == self._max_rounds - 1
            title = f"{self._group.name}: round {number + 1}"
            opens = number == 0 or not self._side_by_side
            for place, running in enumerate(self._alive[first:] + self._alive[:first]):
                if opens or place == 0:
                    self._progress(f"{title}, {running.case.name}" if opens else title)
                self._attempt(running, self._measure)
                if is_last and not self._side_by_side:
                    self._attempt(running, self._finish)
                if not self._side_by_side:
                    running.close()
                elif running.worker is not None:
                    running.worker.pause()
        for running in self._alive if self._side_by_side or not self._max_rounds else ():
            self._progress(f"{self._group.name}: accuracy, {running.case.name}")
            self._attempt(running, self._finish)

    def _attempt(self, running: _Running, step: Callable[[_Running], None]) -> None:
        """Do a step of a case, which is opened before if it is not open; an error ends the case."""
        if running.error:
            return
        try:
            if running.worker is None:
                running.worker = Worker()
                self._open(running)
            running.worker.resume()
            step(running)
        except WorkerError as error:
            running.error = str(error)
            running.close()

    def _open(self, running: _Running) -> None:
        case, warmup_s = running.case, self._options.warmup_s
        described = {"target": case.target, "settings": case.settings}
        opened = running.call("open", self._timeout, **described)
        running.metrics["open_ms"] = opened["open_ms"]
        if self._group.runs is not None:
            return
        # The first run is apart: libraries compile and allocate in it. The device memory in use by
        # then is this case's; later it may be another's that was opened meanwhile.
        first = running.call("run", self._timeout, max_runs=1, seconds=0)
        before, after = opened["device_before"], first["device_bytes"]
        if before is not None and after is not None:
            running.device_bytes.append(after - before)
        running.metrics["first_run_ms"] = first["runs"][0][TOTAL]
        if running.metrics["first_run_ms"] < 1e3 * warmup_s:
            running.call("run", self._timeout, max_runs=MAX_RUNS, seconds=warmup_s)

    def _measure(self, running: _Running) -> None:
        max_runs, seconds = MAX_RUNS, self._options.min_time_s / self._options.rounds
        timeout = self._timeout + seconds
        if self._group.runs is not None:
            max_runs, seconds = -(-self._group.runs // self._min_rounds), 1e9
            timeout = max_runs * self._timeout
        if running.metrics.get("first_run_ms", 1e9) < SHORT_RUN_MS:
            # Whatever ran in between has emptied the caches.
            running.call("run", timeout, max_runs=1, seconds=0)
        response = running.call("run", timeout, max_runs=max_runs, seconds=seconds)
        running.rounds.append(response["runs"])
        running.host_bytes.append(response["peak_bytes"])

    def _finish(self, running: _Running) -> None:
        found = running.call("finish", 10 * self._timeout)
        running.metrics.update(found.get("metrics", {}))
        running.accuracy = found.get("accuracy")
        running.close()

    def result(self) -> GroupResult:
        """Summarize what was measured."""
        group = self._group
        method = "interleaved rounds, "
        method += "side by side" if self._side_by_side else "each case opened again"
        if group.runs == 0:
            method = "one case after the other, no time is measured"
        elif len(self._alive) <= 1:
            method = "one case"
        baseline = next((r for r in self.cases if r.case.name == group.baseline), None)
        cases = tuple(_summarize(running, baseline) for running in self.cases)
        return GroupResult(group.suite, group.name, group.unit, cases, method, group.parameter)


def _summarize(running: _Running, baseline: _Running | None) -> CaseResult:
    name, labels = running.case.name, dict(running.case.labels)
    if running.error or not running.rounds:  # a group without runs has accuracy only
        return CaseResult(name, labels, running.error, accuracy=running.accuracy)
    latency, ratio = summarize_runs(running.milliseconds()), None
    if baseline is not None and baseline is not running and baseline.rounds and not baseline.error:
        theirs = summarize_runs(baseline.milliseconds()).round_medians
        ratio = ratio_of_rounds(baseline.case.name, latency.round_medians, theirs)
    runs = [run for part in running.rounds for run in part]
    found = {stage: [run[stage] for run in runs if stage in run] for stage in runs[0]}
    medians = {stage: rounded(np.median(found[stage])) for stage in found if stage != TOTAL}
    memory = Memory(max(running.host_bytes), max(running.device_bytes, default=None))
    measured = (latency, medians, memory, running.accuracy, ratio, running.metrics)
    return CaseResult(name, labels, "", *measured)
