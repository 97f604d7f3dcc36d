"""Options of a run; cases, groups and workloads: what a suite plans, and what a worker opens."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bench.report import Skipped
from coprs_deploy.closing import Closeable
from coprs_deploy.errors import check_number
from coprs_deploy.model_config import SAM_SIZES

TOTAL = "total"
"""Key of a run's own measurement, used instead of the worker's clock."""

Values: TypeAlias = dict[str, NDArray[Any]]
Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One measurement; its name says exactly what is run.

    Attributes:
        target: ``module:function`` or ``path.py:function``; called in the worker process with
            ``settings`` as keywords, it returns a :class:`Workload`.
        settings: plain data, or functions that make it once the filter has selected the case, and
            may raise ``WorkerError``.
        labels: properties, as ``runtime``, ``precision``, ``device``.
        estimated_bytes: resident memory that the worker will need.
        error: why the case cannot be run here; empty otherwise.
    """

    name: str
    target: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    estimated_bytes: int = 700_000_000
    error: str = ""


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other, in interleaved rounds.

    Attributes:
        baseline: name of the case whose time counts as 1; None compares nothing.
        unit: what one run is.
        parameter: label that the cases scale over.
        runs: minimum number of long, cold runs, without warm-up; 0 measures accuracy only; None
            measures by time.
        timeout_s: limit of one run; None takes that of the options.
        suite: name of its suite.
    """

    name: str
    cases: Sequence[Case]
    baseline: str | None = None
    unit: str = "one run"
    parameter: str = ""
    runs: int | None = None
    timeout_s: float | None = None
    suite: str = ""


Planned: TypeAlias = Iterator[Group | Skipped]
"""What a suite measures here, and what it skips; the run adds the name of the suite."""


class Workload(Closeable):
    """What a case opened in its worker process."""

    @abstractmethod
    def run(self) -> Mapping[str, float]:
        """Do once what is measured, to its very end; return milliseconds by stage, if any.

        The time under :data:`TOTAL` counts instead of the worker's clock.
        """

    def finish(self) -> Mapping[str, Any]:
        """Measure accuracy at the end; return ``metrics`` (numbers) and ``accuracy``, if any."""
        return {}

    def close(self) -> None:
        """Free what was opened."""


def write_arrays(path: Path, values: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)


def read_inputs(folder: Path) -> Iterator[Values]:
    """Read the input files of a benchmark in order, see ``preparation.write_inputs``."""
    from safetensors.numpy import load_file

    for index in range(len(list(folder.glob("[0-9]*.safetensors")))):
        yield load_file(folder / f"{index}.safetensors")


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how.

    Attributes:
        bundle: bundle to measure; None takes the demo model.
        checkpoint: checkpoint of the bundle, for PyTorch cases and other precisions.
        suites: names of suites; empty takes the default ones.
        sizes: SAM sizes to measure with random weights, where a suite needs no policy.
        devices: ``cpu``, ``cuda`` or both.
        deadlines_ms: deadlines of the suite ``latency`` in milliseconds.
        filter: regular expression; only cases whose ``group: case`` matches are run.
        calibration: folder of images for int8.
        is_quick: leave out what takes long: lower precisions on a CPU, the small graphs alone, some
            of the repetitions.
        tag: first word of the report's file names; empty takes the model's name.
        command: command that makes the report again.
        min_time_s: measured time of a case, all rounds together.
        rounds: number of rounds.
        max_rounds: number of rounds while a median is not yet stable.
        warmup_s: unmeasured time before the first round; at least two runs, or one longer run.
        case_timeout_s: seconds after which opening a case, or one run, is given up.
        max_memory_bytes: memory of the cases of a group that are open side by side.
        work_dir: folder of prepared files, kept for the next run; None takes a temporary one.
        prepare_only: stop when everything is prepared.
    """

    bundle: Path | None = None
    checkpoint: Path | None = None
    suites: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    deadlines_ms: tuple[float, ...] = ()
    filter: str = ""
    calibration: Path | None = None
    is_quick: bool = False
    tag: str = ""
    command: str = "coprs-deploy bench"
    min_time_s: float = 3.0
    rounds: int = 3
    max_rounds: int = 5
    warmup_s: float = 1.0
    case_timeout_s: float = 120.0
    max_memory_bytes: int = 4_000_000_000
    work_dir: Path | None = None
    prepare_only: bool = False

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in SAM_SIZES:
                raise ValueError(f"sizes names {size!r}; accepted: {', '.join(SAM_SIZES)}, all")
        for deadline in self.deadlines_ms:
            check_number("deadlines_ms", deadline, above=0, is_whole=False)
        if self.rounds < 1:
            raise ValueError(f"--rounds is {self.rounds}; accepted: 1 and more")
        if self.checkpoint and not self.bundle:
            raise ValueError("--checkpoint needs BUNDLE; the demo model has its own checkpoint")
        if self.prepare_only and self.work_dir is None:
            raise ValueError("--prepare-only keeps what it makes: name a folder with --work-dir")
        try:
            re.compile(self.filter)
        except re.error as error:
            text = f"--filter is {self.filter!r}; accepted: a regular expression ({error})"
            raise ValueError(text) from error
