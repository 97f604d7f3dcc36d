"""Two reports compared: what got slower, larger or less exact, beyond the noise of either.

A row is slower when the new median is above the old one by more than the tolerance, the two 95 %
intervals of the medians do not meet, and neither do the ranges of their medians by round. Faster is
the same, turned round.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coprs_deploy.benchmarks.cells import milliseconds, number_of_bytes, peak_of
from coprs_deploy.benchmarks.report import Latency, Report, Row


class Verdict(str, Enum):
    """What became of a row."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "SLOWER"
    LARGER = "MORE MEMORY"
    LESS_EXACT = "LESS EXACT"
    FAILS = "FAILS NOW"
    REPAIRED = "works now"
    GONE = "gone"
    NEW = "new"


REGRESSIONS = (Verdict.SLOWER, Verdict.LARGER, Verdict.LESS_EXACT, Verdict.FAILS)
"""What sets the exit code."""


@dataclass(frozen=True)
class Tolerances:
    """What may change without being a regression.

    Attributes:
        time: share of the old median.
        memory: share of the old peak.
        mask_iou: absolute, of the mean IoU with float32 or with the truth.
        cosine: absolute, of the embedding's smallest cosine.
    """

    time: float = 0.05
    memory: float = 0.10
    mask_iou: float = 0.005
    cosine: float = 0.001


@dataclass(frozen=True)
class Finding:
    """One row of both reports: its place, what became of it, and the figures."""

    place: str
    verdict: Verdict
    detail: str

    @property
    def is_regression(self) -> bool:
        """Whether it sets the exit code."""
        return self.verdict in REGRESSIONS


def compare_reports(old: Report, new: Report, tolerances: Tolerances) -> list[Finding]:
    """Compare every row of two reports.

    Rows are the same when suite, group and name are, versions of libraries left out: what an update
    did is a question to ask.

    Raises:
        ValueError: no row of one is in the other, so that nothing would be compared.
    """
    before, after = _rows(old), _rows(new)
    if before.keys().isdisjoint(after.keys()):
        raise ValueError(
            f"the reports share no row ({old.theme}, {len(before)} rows; {new.theme}, "
            f"{len(after)} rows): compare two of the same suites and bundle"
        )
    findings = []
    for place, row in before.items():
        if place not in after:
            findings.append(Finding(place, Verdict.GONE, "not in the new report"))
        else:
            findings += _compare(place, row, after[place], tolerances)
    for place, row in after.items():
        if place not in before:
            detail = row.reason or (milliseconds(row.latency.p50) if row.latency else "")
            findings.append(Finding(place, Verdict.NEW, detail))
    return findings


def machine_differences(old: Report, new: Report) -> list[str]:
    """Say what differs between the two machines, in words."""
    a, b = old.machine, new.machine
    pairs = (
        ("processor", a.processor, b.processor),
        ("cores", str(a.cores), str(b.cores)),
        ("GPU", str(a.gpu), str(b.gpu)),
        ("driver", str(a.driver), str(b.driver)),
    )
    found = [f"{name}: {was} then, {now} now" for name, was, now in pairs if was != now]
    rates = {c.device: c for c in new.ceilings}
    for ceilings in old.ceilings:
        now = rates.get(ceilings.device)
        for name, was in ceilings.matmul_flops.items():
            if now is None or name not in now.matmul_flops:
                continue
            change = now.matmul_flops[name] / was - 1
            if abs(change) > 0.1:
                found.append(
                    f"a large {name} product on {ceilings.device} itself is "
                    f"{abs(change):.0%} {'faster' if change > 0 else 'slower'} now"
                )
    return found


def _rows(report: Report) -> dict[str, Row]:
    return {
        f"{group.suite} / {group.name} / {_without_versions(row.name)}": row
        for group in report.groups
        for row in group.rows
    }


def _without_versions(name: str) -> str:
    words = (word.rstrip(",") for word in name.split())
    return " ".join(w for w in words if not (w[0].isdigit() and w.count(".") >= 1))


def _compare(place: str, old: Row, new: Row, tolerances: Tolerances) -> list[Finding]:
    if new.reason and not old.reason:
        return [Finding(place, Verdict.FAILS, new.reason)]
    if old.reason:
        verdict = Verdict.SAME if new.reason else Verdict.REPAIRED
        return [Finding(place, verdict, new.reason)]
    findings = []
    if old.latency is not None and new.latency is not None:
        findings.append(_times(place, old.latency, new.latency, tolerances.time))
    was, now = peak_of(old), peak_of(new)
    if was and now and now > was * (1 + tolerances.memory):
        detail = f"{number_of_bytes(was)} -> {number_of_bytes(now)}"
        findings.append(Finding(place, Verdict.LARGER, detail))
    for name, least in (
        ("mask_iou", tolerances.mask_iou),
        ("truth_iou", tolerances.mask_iou),
        ("embedding_cosine", tolerances.cosine),
        ("concentration_cosine", tolerances.cosine),
    ):
        first = getattr(old.accuracy, name, None)
        second = getattr(new.accuracy, name, None)
        if first is not None and (second is None or second < first - least):
            shown = "none" if second is None else f"{second:.5f}"
            detail = f"{name} {first:.5f} -> {shown}"
            findings.append(Finding(place, Verdict.LESS_EXACT, detail))
    return findings or [Finding(place, Verdict.SAME, "")]


def _times(place: str, old: Latency, new: Latency, tolerance: float) -> Finding:
    change = new.p50 / old.p50 - 1
    detail = f"{milliseconds(old.p50)} -> {milliseconds(new.p50)} ({change:+.1%})"
    verdict = Verdict.SAME
    if abs(change) > tolerance:
        if _are_apart(old, new):
            verdict = Verdict.SLOWER if change > 0 else Verdict.FASTER
        else:
            detail += ", within the noise"
    return Finding(place, verdict, detail)


def _are_apart(first: Latency, second: Latency) -> bool:
    """Whether two medians differ by more than the noise inside each measurement."""
    low, high = (first, second) if first.p50 < second.p50 else (second, first)
    intervals = low.high < high.low
    if low.round_medians and high.round_medians:
        return intervals and max(low.round_medians) < min(high.round_medians)
    return intervals
