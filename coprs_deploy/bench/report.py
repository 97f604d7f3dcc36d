"""The benchmark report, one JSON file: machine, cases, latency, accuracy, memory; statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.errors import ArtifactError
from coprs_deploy.machine import Machine
from coprs_deploy.specs import Record

SCHEMA_VERSION = 1

LIMIT = "limit"
"""Label of cases that differ in the limit of their reasoning."""


class Latency(Record, frozen=True):
    """Latency of one run in milliseconds, over ``n`` measured runs; percentiles are measured runs.

    Attributes:
        ci_low: lower end of the median's 95 % confidence interval; ``ci_high`` is the upper end.
        round_medians: median of each round.
        samples: runs in order, thinned evenly beyond some hundreds.
        clock: ``wall`` or ``device events``.
    """

    n: int
    p50: float
    p90: float
    p99: float
    minimum: float
    ci_low: float
    ci_high: float
    round_medians: tuple[float, ...]
    samples: tuple[float, ...]
    clock: str = "wall"

    @property
    def ci(self) -> tuple[float, float]:
        """Confidence interval of the median."""
        return self.ci_low, self.ci_high


class Accuracy(Record, frozen=True):
    """Distance of a case from PyTorch in float32 on the same inputs, and from the ground truth.

    Attributes:
        inputs: number of inputs.
        embedding_cosine: smallest cosine of the image embedding.
        concentration_cosine: smallest cosine of the policy's vectors.
        prior_relative_error: largest difference of the prior logits over their largest value.
        mask_relative_error: the same for the mask logits.
        mask_iou_mean: mean IoU with the float32 masks; ``mask_iou_min`` is the smallest.
        giou: mean IoU with the ground truth; None for random weights.
        precision_at_50: share of inputs whose IoU with the ground truth is above 0.5.
        note: where the values come from, if not from this run.
    """

    inputs: int
    embedding_cosine: float | None = None
    concentration_cosine: float | None = None
    prior_relative_error: float | None = None
    mask_relative_error: float | None = None
    mask_iou_mean: float | None = None
    mask_iou_min: float | None = None
    giou: float | None = None
    precision_at_50: float | None = None
    note: str = ""


class Memory(Record, frozen=True):
    """Peak memory of a worker process in bytes; None where unknown.

    Attributes:
        host: peak resident memory, pages of mapped files included.
        device: GPU memory in use beyond what was in use before the case was opened.
    """

    host: int | None = None
    device: int | None = None


class Ratio(Record, frozen=True):
    """Time over the baseline's: median, smallest and largest of the ratios of round medians."""

    baseline: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class CaseResult(Record, frozen=True):
    """Measurement of one case, or the error that prevented it.

    Attributes:
        labels: properties of the case, as ``runtime``, ``precision``, ``device``, ``graph``.
        stages: medians of the stages of a run in milliseconds, in order.
        metrics: further numbers; a name ends in its unit, as in ``open_ms``.
    """

    name: str
    labels: dict[str, str] = {}
    error: str = ""
    latency: Latency | None = None
    stages: dict[str, float] = {}
    memory: Memory = Memory()
    accuracy: Accuracy | None = None
    ratio: Ratio | None = None
    metrics: dict[str, float] = {}

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory of what was measured: of the process that the case started, if it did."""
        return self.metrics.get("peak_bytes", self.memory.host)


class GroupResult(Record, frozen=True):
    """Cases that are compared with each other.

    Attributes:
        unit: what one run is.
        method: how the rounds were interleaved.
        parameter: label that the cases scale over; empty otherwise.
    """

    suite: str
    name: str
    unit: str
    cases: tuple[CaseResult, ...]
    method: str
    parameter: str = ""

    @property
    def baseline(self) -> str:
        """Name of the case whose time counts as 1; empty without one."""
        return next((case.ratio.baseline for case in self.cases if case.ratio is not None), "")


class Skipped(Record, frozen=True):
    """What cannot be measured here, why, and what fixes it."""

    name: str
    reason: str
    remedy: str = ""
    suite: str = ""


class Report(Record, frozen=True):
    """A whole benchmark.

    Attributes:
        tag: first word of the file names.
        date: day of the measurement, as ``2026-11-25``.
        command: command that makes it again.
        model: name of the measured bundle.
    """

    schema_version: int
    tag: str
    date: str
    command: str
    model: str
    machine: Machine
    groups: tuple[GroupResult, ...]
    skipped: tuple[Skipped, ...]

    @property
    def stem(self) -> str:
        """Name of its files: tag, kind of machine, date."""
        return f"{self.tag}-{self.machine.kind}-{self.date}"


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        ArtifactError: it cannot be parsed, or has another schema version.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {version}; accepted: {SCHEMA_VERSION}. "
                "Measure again with `coprs-deploy bench --out DIR`"
            )
        return Report.from_json(data)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot parse benchmark report {path}: {error}") from error


MAX_SAMPLES = 120
"""Number of single runs that a report keeps of a case."""


def summarize_runs(rounds: Sequence[Sequence[float]]) -> Latency:
    """Summarize the milliseconds of a case's runs, by round."""
    runs = np.array([run for part in rounds for run in part])
    assert len(runs), "a case without a run has an error instead"
    low, high = median_interval(runs)
    return Latency(
        n=len(runs),
        p50=rounded(np.median(runs)),
        p90=rounded(np.quantile(runs, 0.9, method="higher")),
        p99=rounded(np.quantile(runs, 0.99, method="higher")),
        minimum=rounded(runs.min()),
        ci_low=rounded(low),
        ci_high=rounded(high),
        round_medians=tuple(rounded(np.median(part)) for part in rounds if len(part)),
        samples=tuple(rounded(run) for run in runs[:: math.ceil(len(runs) / MAX_SAMPLES)]),
    )


def median_interval(runs: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the distribution-free 95 % confidence interval of the median.

    Its ends are order statistics whose ranks follow from the binomial distribution. With fewer than
    six runs no pair of ranks holds 95 %, and the ends are the extremes.
    """
    ordered = np.sort(np.asarray(runs, dtype=np.float64))
    count = len(ordered)
    # The largest rank with P(fewer than rank of the runs are below the median) <= 2.5 %.
    rank, ways, total = 0, 1, 1  # 2**count times the probabilities, as integers
    while 40 * total <= 2**count:
        rank += 1
        ways = ways * (count - rank + 1) // rank
        total += ways
    rank = max(1, rank)
    return float(ordered[rank - 1]), float(ordered[count - rank])


def is_stable(rounds: Sequence[Sequence[float]], within: float) -> bool:
    """Whether the median's interval is within a share of the median."""
    runs = [run for part in rounds for run in part]
    if not runs:
        return False
    low, high = median_interval(runs)
    return (high - low) / 2 <= within * float(np.median(runs))


def ratio_of_rounds(name: str, rounds: Sequence[float], baseline: Sequence[float]) -> Ratio | None:
    """Compare round medians with those of the baseline ``name``; None without a common round."""
    shared = [case / base for case, base in zip(rounds, baseline, strict=False) if base > 0]
    if not shared:
        return None
    return Ratio(name, *map(rounded, (float(np.median(shared)), min(shared), max(shared))))


def rounded(value: float) -> float:
    """Keep six digits: finer than any clock here, and a readable file."""
    return float(f"{value:.6g}")
