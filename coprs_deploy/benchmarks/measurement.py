"""Groups of cases to rows: warm-up, rounds in which the cases take turns, peaks, accuracy.

Cases of a group are alive side by side, and all but one are stopped, so that none takes another's
time. Where their memory does not fit, each is started anew for its turn in every round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprs_deploy.benchmarks.case import DEVICE, TOTAL, Case, Group
from coprs_deploy.benchmarks.process import Worker, WorkerError
from coprs_deploy.benchmarks.report import (
    Accuracy,
    Ceilings,
    GroupResult,
    Latency,
    Memory,
    Row,
    Work,
)
from coprs_deploy.benchmarks.roofline import against_ceiling
from coprs_deploy.benchmarks.statistics import is_stable, ratio_of_rounds, summarize_runs

Progress = Callable[[str], None]

SHORT_RUN_MS = 200
"""Runs shorter than this are preceded by an unmeasured one in every turn."""


@dataclass(frozen=True)
class Settings:
    """How rows are measured.

    Attributes:
        seconds: measured time of a row, all rounds together.
        rounds: how often the rows take turns.
        most_rounds: how often at most, while a median is not yet stable.
        stable: half-width of the median's 95 % interval that counts as stable, as a share of it.
        warm_up_seconds: how long a row runs unmeasured before its first turn; at least two runs,
            or one where a run takes longer than that.
        limit_seconds: how long opening, or one run, may take before the row is given up.
        memory_bytes: what the processes of a group may take together.
    """

    seconds: float = 3.0
    rounds: int = 3
    most_rounds: int = 5
    stable: float = 0.03
    warm_up_seconds: float = 1.0
    limit_seconds: float = 120.0
    memory_bytes: int = 4_000_000_000


@dataclass
class _Running:
    """A case on its way to a row."""

    case: Case
    worker: Worker | None = None
    reason: str = ""
    rounds: list[list[dict[str, float]]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    memory: Memory = field(default_factory=Memory)
    output: Path | None = None

    def milliseconds(self) -> list[list[float]]:
        """Give the runs by round, between device events where there are any."""
        key = DEVICE if self.has_device_events else TOTAL
        return [[run[key] for run in runs] for runs in self.rounds]

    @property
    def has_device_events(self) -> bool:
        return all(DEVICE in run for runs in self.rounds for run in runs)


class Measurement:
    """Measures groups one after the other.

    Args:
        settings: how.
        ceilings: by device, for the roofline.
        progress: called with the name of each step as it starts.
    """

    def __init__(
        self,
        settings: Settings,
        ceilings: Mapping[str, Ceilings],
        progress: Progress = lambda step: None,
    ) -> None:
        self._settings = settings
        self._ceilings = ceilings
        self._progress = progress

    def measure(self, group: Group) -> GroupResult:
        """Measure a group; a case that fails becomes a row with its reason."""
        running = [_Running(case, reason=case.problem) for case in group.cases]
        alive = [row for row in running if not row.reason]
        needed = sum(row.case.estimated_bytes for row in alive)
        side_by_side = needed <= self._settings.memory_bytes or len(alive) == 1
        with tempfile.TemporaryDirectory(prefix="coprs-bench-") as folder:
            for index, row in enumerate(running):
                row.output = Path(folder) / str(index)
            try:
                if not alive:
                    pass
                elif side_by_side:
                    self._take_turns(group, alive)
                else:
                    self._start_anew(group, alive)
            finally:
                for row in running:
                    if row.worker is not None:
                        row.worker.close()
            self._judge(group, [row for row in alive if not row.reason])
        method = (
            "rows take turns, side by side"
            if side_by_side
            else "rows take turns, each started anew"
        )
        if group.runs == 0:
            method = "one row after the other, no time is measured"
        elif len(alive) <= 1:
            method = "one row"
        rows = tuple(self._row(row, self._find(running, group.baseline)) for row in running)
        return GroupResult(
            suite=group.suite,
            name=group.name,
            unit=group.unit,
            rows=rows,
            method=method,
            parameter=group.parameter,
        )

    def _take_turns(self, group: Group, alive: list[_Running]) -> None:
        for row in alive:
            self._progress(f"{group.name}: {row.case.name}")
            self._open(group, row)
            if row.worker is not None:
                row.worker.pause()
        for number in range(self._most_rounds(group)):
            if number >= self._least_rounds(group) and self._is_stable(alive):
                break
            self._progress(f"{group.name}: round {number + 1}")
            for row in alive[number % len(alive) :] + alive[: number % len(alive)]:
                if row.worker is not None:
                    row.worker.resume()
                    self._run(group, row)
                if row.worker is not None:
                    row.worker.pause()
        for row in alive:
            if row.worker is not None:
                row.worker.resume()
                self._finish(group, row)

    def _start_anew(self, group: Group, alive: list[_Running]) -> None:
        is_timed = self._least_rounds(group) > 0
        rounds = max(1, self._least_rounds(group))  # accuracy is measured of what is never timed
        for number in range(rounds):
            for row in alive[number % len(alive) :] + alive[: number % len(alive)]:
                if row.reason:
                    continue
                self._progress(f"{group.name}: round {number + 1}, {row.case.name}")
                self._open(group, row)
                if row.worker is not None and is_timed:
                    self._run(group, row)
                if row.worker is not None and number == rounds - 1:
                    self._finish(group, row)
                if row.worker is not None:
                    row.worker.close()
                    row.worker = None

    def _least_rounds(self, group: Group) -> int:
        return self._settings.rounds if group.runs is None else min(3, group.runs)

    def _most_rounds(self, group: Group) -> int:
        return self._settings.most_rounds if group.runs is None else self._least_rounds(group)

    def _is_stable(self, alive: list[_Running]) -> bool:
        return all(
            row.reason or is_stable(row.milliseconds(), self._settings.stable) for row in alive
        )

    def _open(self, group: Group, row: _Running) -> None:
        row.worker = Worker()
        limit = self._limit(group)
        try:
            opened = row.worker.ask(
                {"do": "open", "target": row.case.target, "settings": dict(row.case.settings)},
                limit,
            )
            row.figures["open_ms"] = opened["open_ms"]
            if group.runs is not None:
                return
            # The first run is apart: libraries compile and allocate in it. What the device has lost
            # by then is this row's; later it may be another's that was opened meanwhile.
            first = row.worker.ask({"do": "run", "most": 1, "seconds": 0}, limit)
            before, after = opened["device_before"], first["device_bytes"]
            if before is not None and after is not None:
                row.memory = Memory(row.memory.host, _largest(after - before, row.memory.device))
            row.figures["first_run_ms"] = first["runs"][0][TOTAL]
            if row.figures["first_run_ms"] < 1e3 * self._settings.warm_up_seconds:
                warm_up = {"do": "run", "most": 1000, "seconds": self._settings.warm_up_seconds}
                row.worker.ask(warm_up, limit)
        except WorkerError as error:
            self._give_up(row, str(error))

    def _run(self, group: Group, row: _Running) -> None:
        assert row.worker is not None
        most, seconds = 1000, self._settings.seconds / self._settings.rounds
        limit = self._limit(group) + seconds
        if group.runs is not None:
            most, seconds = -(-group.runs // self._least_rounds(group)), 1e9
            limit = most * self._limit(group)
        try:
            if row.figures.get("first_run_ms", 1e9) < SHORT_RUN_MS:
                # Whatever ran in between has emptied the caches.
                row.worker.ask({"do": "run", "most": 1, "seconds": 0}, limit)
            answer = row.worker.ask({"do": "run", "most": most, "seconds": seconds}, limit)
        except WorkerError as error:
            self._give_up(row, str(error))
            return
        row.rounds.append(answer["runs"])
        row.memory = Memory(_largest(answer["peak_bytes"], row.memory.host), row.memory.device)

    def _finish(self, group: Group, row: _Running) -> None:
        assert row.worker is not None and row.output is not None
        try:
            said = row.worker.ask(
                {"do": "finish", "folder": str(row.output)}, 10 * self._limit(group)
            )
        except WorkerError as error:
            self._give_up(row, str(error))
            return
        row.figures.update(said.get("figures", {}))
        if "accuracy" in said:
            row.accuracy = Accuracy.from_json(said["accuracy"])
        row.worker.close()
        row.worker = None

    def _limit(self, group: Group) -> float:
        return group.limit_seconds or self._settings.limit_seconds

    def _give_up(self, row: _Running, reason: str) -> None:
        row.reason = reason
        if row.worker is not None:
            row.worker.close()
            row.worker = None

    def _judge(self, group: Group, finished: list[_Running]) -> None:
        if group.judge is None or not finished:
            return
        self._progress(f"{group.name}: accuracy")
        folders = {row.case.name: row.output for row in finished if row.output is not None}
        try:
            judged = group.judge(folders)
        except WorkerError as error:
            for row in finished:
                row.accuracy = Accuracy(inputs=0, note=f"could not be judged: {error}")
            return
        for row in finished:
            row.accuracy = judged.get(row.case.name, row.accuracy)

    def _row(self, row: _Running, baseline: _Running | None) -> Row:
        case = row.case
        labels = dict(case.labels)
        if row.reason:
            return Row(case.name, labels, row.reason)
        if not row.rounds:  # a group without runs: accuracy only
            return Row(case.name, labels, accuracy=row.accuracy)
        latency = summarize_runs(
            row.milliseconds(), "device events" if row.has_device_events else "wall"
        )
        ratio = None
        if baseline is not None and baseline is not row and baseline.rounds and not baseline.reason:
            theirs = summarize_runs(baseline.milliseconds()).round_medians
            ratio = ratio_of_rounds(baseline.case.name, latency.round_medians, theirs)
        return Row(
            name=case.name,
            labels=labels,
            latency=latency,
            stages=_stage_medians(row.rounds),
            memory=row.memory,
            accuracy=row.accuracy,
            work=self._work(case, latency),
            ratio=ratio,
            figures=row.figures,
        )

    def _work(self, case: Case, latency: Latency) -> Work | None:
        if case.work is None:
            return None
        ceilings = self._ceilings.get(case.labels.get("device", "cpu").partition(":")[0])
        if ceilings is None:
            return case.work
        return against_ceiling(case.work, ceilings, case.products, latency.p50)

    @staticmethod
    def _find(running: list[_Running], name: str | None) -> _Running | None:
        return next((row for row in running if row.case.name == name), None)


def _stage_medians(rounds: list[list[dict[str, float]]]) -> dict[str, float]:
    import numpy as np

    runs: list[dict[str, Any]] = [run for part in rounds for run in part]
    names = [name for name in runs[0] if name not in (TOTAL, DEVICE)]
    return {n: float(f"{np.median([r[n] for r in runs if n in r]):.6g}") for n in names}


def _largest(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return max(known) if known else None


def memory_for_rows() -> int:
    """Give half of the memory that is free now, for rows that are alive side by side."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return Settings.memory_bytes
    free = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return 512 * free[0] if free else Settings.memory_bytes
