"""Cases, groups and workloads: what a suite plans, and what a worker process opens and runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.bench.report import Skipped
from coprs_deploy.closing import Closeable

TOTAL = "total"
"""Key of a run's own measurement, used instead of the worker's clock."""

Values: TypeAlias = dict[str, NDArray[Any]]


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
    cases: tuple[Case, ...]
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
        """Do once what is measured, to its very end.

        Returns:
            Milliseconds by stage, if any; under :data:`TOTAL` the time that counts instead of the
            worker's clock.
        """

    def finish(self) -> Mapping[str, Any]:
        """Measure accuracy, after the last run.

        Returns:
            ``metrics`` (numbers by name) and ``accuracy``, a ``report.Accuracy``, if any.
        """
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
