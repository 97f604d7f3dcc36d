"""Measurement of a group: warm-up, interleaved rounds, peak memory, accuracy.

The cases of a group are open side by side in a worker process each, and all but one are stopped, so
that none takes another one's time. Where their memory does not fit, each is opened again in every
round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.bench.case import DEVICE, TOTAL, Case, Group
from coprs_deploy.bench.options import BenchOptions
from coprs_deploy.bench.process import Worker, WorkerError
from coprs_deploy.bench.report import Accuracy, CaseResult, GroupResult, Memory
from coprs_deploy.bench.statistics import is_stable, ratio_of_rounds, summarize_runs

Progress = Callable[[str], None]

SHORT_RUN_MS = 200
"""Shorter runs are preceded by an unmeasured one in every round."""

MAX_RUNS = 1000
"""Largest number of runs of a case in one round."""


@dataclass
class _Running:
    """A case while it is measured."""

    case: Case
    output: Path
    error: str
    worker: Worker | None = None
    rounds: list[list[dict[str, float]]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    memory: Memory = field(default_factory=Memory)

    @property
    def clock(self) -> str:
        has_events = all(DEVICE in run for runs in self.rounds for run in runs)
        return "device events" if has_events else "wall"

    def milliseconds(self) -> list[list[float]]:
        """Return the runs by round, by device events where there are any."""
        key = DEVICE if self.clock != "wall" else TOTAL
        return [[run[key] for run in runs] for runs in self.rounds]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def measure_group(
    group: Group, options: BenchOptions, progress: Progress = lambda step: None
) -> GroupResult:
    """Measure the prepared cases of a group; failed cases are reported with their error."""
    with tempfile.TemporaryDirectory(prefix="coprs-bench-") as folder:
        measurement = _Measurement(group, options, progress, Path(folder))
        try:
            measurement.run()
        finally:
            for running in measurement.cases:
                running.close()
        measurement.evaluate()
    return measurement.result()


class _Measurement:
    """One group being measured."""

    def __init__(
        self, group: Group, options: BenchOptions, progress: Progress, folder: Path
    ) -> None:
        self.cases = [
            _Running(case, folder / str(index), case.error)
            for index, case in enumerate(group.cases)
        ]
        self._group, self._options, self._progress = group, options, progress
        self._alive = [running for running in self.cases if not running.error]
        needed = sum(running.case.estimated_bytes for running in self._alive)
        self._side_by_side = needed <= options.max_memory_bytes or len(self._alive) == 1
        self._timeout = group.timeout_s or options.case_timeout_s
        self._min_rounds, self._max_rounds = options.rounds, options.max_rounds
        if group.runs is not None:
            self._min_rounds = self._max_rounds = min(3, group.runs)
        if not self._side_by_side:  # accuracy is measured of what is never timed
            self._max_rounds = max(1, self._min_rounds)

    def run(self) -> None:
        """Run all rounds."""
        for running in self._alive if self._side_by_side else ():
            self._progress(f"{self._group.name}: {running.case.name}")
            self._attempt(running, self._open)
            self._pause(running)
        for number in range(self._max_rounds if self._alive else 0):
            if self._side_by_side and number >= self._min_rounds and self._is_stable():
                break
            self._run_round(number)
        for running in self._alive if self._side_by_side else ():
            if running.worker is not None:
                running.worker.resume()
            self._attempt(running, self._finish)

    def _run_round(self, number: int) -> None:
        """Measure each case once, beginning with another case each time."""
        title, first = f"{self._group.name}: round {number + 1}", number % len(self._alive)
        if self._side_by_side:
            self._progress(title)
        for running in self._alive[first:] + self._alive[:first]:
            if running.error:
                continue
            if running.worker is not None:
                running.worker.resume()
            else:
                self._progress(f"{title}, {running.case.name}")
                self._attempt(running, self._open)
            if self._min_rounds > 0:
                self._attempt(running, self._measure)
            if self._side_by_side:
                self._pause(running)
                continue
            if number == self._max_rounds - 1:
                self._attempt(running, self._finish)
            running.close()

    def _attempt(self, running: _Running, step: Callable[[_Running, Worker], None]) -> None:
        """Do a step of a case; an error ends the case."""
        if running.error:
            return
        try:
            if running.worker is None:
                running.worker = Worker()
            step(running, running.worker)
        except WorkerError as error:
            running.error = str(error)
            running.close()

    @staticmethod
    def _pause(running: _Running) -> None:
        if running.worker is not None:
            running.worker.pause()

    def _is_stable(self) -> bool:
        within = self._options.stable_within
        return all(r.error or is_stable(r.milliseconds(), within) for r in self._alive)

    def _run_for(
        self, worker: Worker, max_runs: int, seconds: float, timeout: float | None = None
    ) -> dict[str, Any]:
        message = {"do": "run", "max_runs": max_runs, "seconds": seconds}
        return worker.request(message, timeout or self._timeout)

    def _open(self, running: _Running, worker: Worker) -> None:
        case, warmup_s = running.case, self._options.warmup_s
        message = {"do": "open", "target": case.target, "settings": dict(case.settings)}
        opened = worker.request(message, self._timeout)
        running.metrics["open_ms"] = opened["open_ms"]
        if self._group.runs is not None:
            return
        # The first run is apart: libraries compile and allocate in it. The device memory in use by
        # then is this case's; later it may be another's that was opened meanwhile.
        first = self._run_for(worker, 1, 0)
        before, after = opened["device_before"], first["device_bytes"]
        if before is not None and after is not None:
            device = _larger(after - before, running.memory.device)
            running.memory = Memory(running.memory.host, device)
        running.metrics["first_run_ms"] = first["runs"][0][TOTAL]
        if running.metrics["first_run_ms"] < 1e3 * warmup_s:
            self._run_for(worker, MAX_RUNS, warmup_s)

    def _measure(self, running: _Running, worker: Worker) -> None:
        max_runs, seconds = MAX_RUNS, self._options.min_time_s / self._options.rounds
        timeout = self._timeout + seconds
        if self._group.runs is not None:
            max_runs, seconds = -(-self._group.runs // self._min_rounds), 1e9
            timeout = max_runs * self._timeout
        if running.metrics.get("first_run_ms", 1e9) < SHORT_RUN_MS:
            self._run_for(worker, 1, 0, timeout)  # whatever ran in between has emptied the caches
        response = self._run_for(worker, max_runs, seconds, timeout)
        running.rounds.append(response["runs"])
        host = _larger(response["peak_bytes"], running.memory.host)
        running.memory = Memory(host, running.memory.device)

    def _finish(self, running: _Running, worker: Worker) -> None:
        message = {"do": "finish", "folder": str(running.output)}
        found = worker.request(message, 10 * self._timeout)
        running.metrics.update(found.get("metrics", {}))
        if "accuracy" in found:
            running.accuracy = Accuracy.from_json(found["accuracy"])
        running.close()

    def evaluate(self) -> None:
        """Measure the accuracy of the outputs."""
        finished = [running for running in self._alive if not running.error]
        if self._group.evaluate is None or not finished:
            return
        self._progress(f"{self._group.name}: accuracy")
        try:
            found = self._group.evaluate({r.case.name: r.output for r in finished})
        except WorkerError as error:
            failed = Accuracy(inputs=0, note=f"could not be evaluated: {error}")
            found = {running.case.name: failed for running in finished}
        for running in finished:
            running.accuracy = found.get(running.case.name, running.accuracy)

    def result(self) -> GroupResult:
        """Summarize what was measured."""
        group = self._group
        method = "interleaved rounds, " + (
            "side by side" if self._side_by_side else "each case opened again"
        )
        if group.runs == 0:
            method = "one case after the other, no time is measured"
        elif len(self._alive) <= 1:
            method = "one case"
        baseline = next((r for r in self.cases if r.case.name == group.baseline), None)
        cases = tuple(_summarize(running, baseline) for running in self.cases)
        return GroupResult(group.suite, group.name, group.unit, cases, method, group.parameter)


def _summarize(running: _Running, baseline: _Running | None) -> CaseResult:
    name, labels = running.case.name, dict(running.case.labels)
    if running.error:
        return CaseResult(name, labels, running.error)
    if not running.rounds:  # a group without runs: accuracy only
        return CaseResult(name, labels, accuracy=running.accuracy)
    latency, ratio = summarize_runs(running.milliseconds(), running.clock), None
    if baseline is not None and baseline is not running and baseline.rounds and not baseline.error:
        theirs = summarize_runs(baseline.milliseconds()).round_medians
        ratio = ratio_of_rounds(baseline.case.name, latency.round_medians, theirs)
    runs = [run for part in running.rounds for run in part]
    medians = {
        stage: float(f"{np.median([run[stage] for run in runs if stage in run]):.6g}")
        for stage in runs[0]
        if stage not in (TOTAL, DEVICE)
    }
    measured = (latency, medians, running.memory, running.accuracy, ratio, running.metrics)
    return CaseResult(name, labels, "", *measured)


def _larger(first: int | None, second: int | None) -> int | None:
    return max((value for value in (first, second) if value is not None), default=None)
