"""What a suite plans: groups of cases; and what a case opens in its own process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprs_deploy.benchmarks.report import Accuracy, LeftOut, Work
from coprs_deploy.closing import Closeable

TOTAL = "total"
"""Key of a run's own measurement; without it the caller's clock counts."""

DEVICE = "device"
"""Key of the time between two device events."""


@dataclass(frozen=True)
class Case:
    """One row to be.

    Attributes:
        name: exactly what is run; unique in its group.
        target: ``module:function``; the function takes ``settings`` as keywords and returns a
            :class:`Subject`. It is imported in the case's own process only.
        settings: plain data.
        labels: what it is by kind.
        estimated_bytes: resident memory that it will need.
        problem: why it cannot be opened, found while it was prepared; empty otherwise.
        work: operations and bytes of one run, where there is a graph to count.
    """

    name: str
    target: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    estimated_bytes: int = 700_000_000
    problem: str = ""
    work: Work | None = None

    @property
    def products(self) -> str:
        """What most of its products are computed in: the ceiling that it has."""
        precision = self.labels.get("precision", "fp32")
        return precision if precision == "int8" else self.labels.get("products", precision)


SceneEvaluator = Callable[[Mapping[str, Path]], Mapping[str, Accuracy]]
"""Takes the folders that the cases left their outputs in, by name; gives their accuracy."""


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other, and so take turns.

    Attributes:
        suite: name of the suite.
        name: what they have in common.
        cases: the rows to be.
        baseline: name of the case that counts as 1; None compares nothing.
        judge: tells the accuracy; None where the cases say it themselves, or there is none.
        unit: what one run is.
        parameter: the label whose values the cases scale over.
        runs: least number of runs where each is long and cold, without warm-up; 0 measures
            accuracy only; None measures by time.
        limit_seconds: how long one run may take; None takes the setting.
    """

    suite: str
    name: str
    cases: tuple[Case, ...]
    baseline: str | None = None
    judge: SceneEvaluator | None = None
    unit: str = "one run"
    parameter: str = ""
    runs: int | None = None
    limit_seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a suite will measure here, and what it cannot."""

    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...] = ()


class Subject(Closeable):
    """What a case opened, in its own process; it is a context manager."""

    @abstractmethod
    def run(self) -> Mapping[str, float]:
        """Do once what is measured, to its very end.

        Returns:
            Milliseconds of its parts, if any; under :data:`TOTAL` and :data:`DEVICE` what counts
            instead of the caller's clock.
        """

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave outputs for the judge in a folder, after the last run.

        Returns:
            ``figures`` (numbers by name) and ``accuracy`` (an :class:`Accuracy` as JSON), each
            where there is something to say.
        """
        return {}

    def close(self) -> None:
        """Free what was opened."""
