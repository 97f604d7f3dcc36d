"""The record of a benchmark: what was run, on what, how fast, how exact, how much memory.

A report is one JSON file. Its schema has a version; reports of the versions in
:data:`READABLE_VERSIONS` are read, so that a new measurement can be compared with an old one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import write_json
from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import Record

SCHEMA_VERSION = 1
READABLE_VERSIONS = (1,)


class Ceilings(Record, frozen=True):
    """What the machine reaches at best, measured beside the rows.

    Attributes:
        device: ``cpu`` or ``cuda``.
        matmul_flops: floating-point operations a second of a large matrix product, by precision.
        copy_bytes: bytes a second of a large copy, read and written bytes both counted.
        problems: why a precision has no figure.
    """

    device: str
    matmul_flops: dict[str, float]
    copy_bytes: float
    problems: dict[str, str] = {}


class Machine(Record, frozen=True):
    """What the figures were measured on.

    Attributes:
        kind: names such machines in file names, as in ``cpu-2-cores-avx2``.
        processor: its name.
        vector_units: instruction sets that matter for matrix products, narrowest first.
        cores: how many this process may use.
        memory_bytes: of the host.
        gpu: name and compute capability; None without one.
        driver: of the GPU.
        system: kernel and architecture.
        versions: of Python and of the packages that take part.
        commit: of the checkout, with ``-dirty`` when files differ; None outside one.
    """

    kind: str
    processor: str
    vector_units: tuple[str, ...]
    cores: int
    memory_bytes: int
    gpu: str | None
    driver: str | None
    system: str
    versions: dict[str, str]
    commit: str | None


class Latency(Record, frozen=True):
    """How long one run took, in milliseconds.

    Attributes:
        n: measured runs, warm-up left out.
        p50: median.
        p90: nine of ten runs are faster.
        p99: likewise of a hundred; with few runs, the slowest.
        minimum: fastest run.
        low: lower end of the 95 % interval of the median, from order statistics.
        high: its upper end.
        round_medians: the median of each round, in which the rows took turns.
        samples: every run, in order; thinned out evenly above some hundreds.
        clock: ``wall`` or ``device events``.
    """

    n: int
    p50: float
    p90: float
    p99: float
    minimum: float
    low: float
    high: float
    round_medians: tuple[float, ...]
    samples: tuple[float, ...]
    clock: str = "wall"


class Accuracy(Record, frozen=True):
    """How far a row is from PyTorch in float32 on the same inputs, and from the truth.

    Attributes:
        inputs: how many.
        embedding_cosine: smallest cosine of the image embedding.
        concentration_cosine: smallest cosine of the policy's vectors.
        prior_error: largest difference of the prior logits over their largest value.
        mask_error: the same of the mask logits.
        mask_iou: IoU with float32's masks, the mean.
        mask_iou_worst: the smallest.
        truth_iou: IoU with the true masks, the mean; None where weights are random.
        precision_at_half: share of inputs whose IoU with the truth is above one half.
        note: where the figures come from, if not from this run.
    """

    inputs: int
    embedding_cosine: float | None = None
    concentration_cosine: float | None = None
    prior_error: float | None = None
    mask_error: float | None = None
    mask_iou: float | None = None
    mask_iou_worst: float | None = None
    truth_iou: float | None = None
    precision_at_half: float | None = None
    note: str = ""


class Memory(Record, frozen=True):
    """Peaks of the row's own process in bytes; None where unknown.

    Attributes:
        host: largest resident memory, pages of mapped files included.
        device: GPU memory that was taken beyond what was taken before the row was opened.
    """

    host: int | None = None
    device: int | None = None


class Work(Record, frozen=True):
    """A graph against the machine's ceilings (roofline).

    Attributes:
        flops: floating-point operations of one run, counted from the ONNX graph.
        bytes: least traffic: weights, inputs and outputs, each once.
        bound: ``compute`` or ``memory``, whichever ceiling needs longer.
        least_ms: what that ceiling allows.
        share: ``least_ms`` over the median.
        ceiling: the precision of the matrix product that was taken.
    """

    flops: float
    bytes: float
    bound: str | None = None
    least_ms: float | None = None
    share: float | None = None
    ceiling: str | None = None


class Ratio(Record, frozen=True):
    """A row against the baseline of its group: how many times as long it takes.

    Attributes:
        baseline: name of the row that counts as 1.
        value: median over the rounds of the ratio of the two medians of a round.
        low: the smallest of those.
        high: the largest.
    """

    baseline: str
    value: float
    low: float
    high: float


class Row(Record, frozen=True):
    """One thing that was measured, or the reason why it was not.

    Attributes:
        name: exactly what was run.
        labels: what it is by kind, as ``runtime``, ``precision``, ``device``, ``graph``, ``sam``.
        reason: why there is no figure; empty when there is one.
        latency: of one run.
        stages: medians of the parts of a run in milliseconds, in order.
        memory: peaks.
        accuracy: against float32 and the truth.
        work: against the ceilings.
        ratio: against the group's baseline.
        figures: what else was measured; the name ends in its unit, as in ``load_ms``.
    """

    name: str
    labels: dict[str, str] = {}
    reason: str = ""
    latency: Latency | None = None
    stages: dict[str, float] = {}
    memory: Memory = Memory()
    accuracy: Accuracy | None = None
    work: Work | None = None
    ratio: Ratio | None = None
    figures: dict[str, float] = {}


class GroupResult(Record, frozen=True):
    """Rows that are compared with each other.

    Attributes:
        suite: the suite that they belong to.
        name: what they have in common.
        unit: what one run is.
        rows: in the order in which they took turns.
        method: how the rows took turns.
        parameter: the label whose values the rows scale over; empty when they do not.
    """

    suite: str
    name: str
    unit: str
    rows: tuple[Row, ...]
    method: str
    parameter: str = ""


class LeftOut(Record, frozen=True):
    """Something that cannot be measured here: why, and what mends it."""

    suite: str
    name: str
    reason: str
    remedy: str = ""


class Report(Record, frozen=True):
    """A whole benchmark.

    Attributes:
        schema_version: of this record.
        theme: what was measured, in a word: it names the files.
        date: day of the measurement, as ``2026-11-25``.
        command: what makes it again.
        model: the bundle that was measured, in words.
        machine: what it ran on.
        ceilings: of the devices that were used.
        groups: the rows.
        left_out: what could not be measured here.
    """

    schema_version: int
    theme: str
    date: str
    command: str
    model: str
    machine: Machine
    ceilings: tuple[Ceilings, ...]
    groups: tuple[GroupResult, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def stem(self) -> str:
        """Name of its files: theme, kind of machine, date."""
        return f"{self.theme}-{self.machine.kind}-{self.date}"


def write_report(path: Path, report: Report) -> None:
    """Write a report as JSON."""
    write_json(path, report.to_json())


def read_report(path: Path) -> Report:
    """Read a report.

    Raises:
        ArtifactError: it cannot be read, or is of another schema version.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version not in READABLE_VERSIONS:
            raise ArtifactError(
                f"{path} has schema version {version}; this package reads reports of version "
                f"{', '.join(map(str, READABLE_VERSIONS))}: measure again with "
                "`coprs-deploy bench --out DIR`"
            )
        return Report.from_json(data)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is no report that can be read: {error}") from error
