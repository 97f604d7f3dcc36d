"""Comparison of two reports: what became slower, larger or less accurate, beyond the noise.

A case is slower when the new median exceeds the old one by more than the tolerance, and neither the
two 95 % intervals of the medians overlap nor the ranges of their medians by round.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from coprs_deploy.bench.report import CaseResult, Latency, Report
from coprs_deploy.console import format_bytes, format_ms


class Verdict(str, Enum):
    """What became of a case."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "slower"
    MORE_MEMORY = "more_memory"
    LESS_ACCURATE = "less_accurate"
    FAILS = "fails"
    FIXED = "fixed"
    REMOVED = "removed"
    NEW = "new"


REGRESSIONS = (Verdict.SLOWER, Verdict.MORE_MEMORY, Verdict.LESS_ACCURATE, Verdict.FAILS)
"""Verdicts that set the exit code."""


TIME_TOLERANCE = 0.05
"""Share of the old median by which a time may grow."""

MEMORY_TOLERANCE = 0.10
"""Share of the old peak by which memory may grow."""

ACCURACY_TOLERANCES = {
    "mask_iou_mean": 0.005,
    "giou": 0.005,
    "embedding_cosine": 0.001,
    "concentration_cosine": 0.001,
}
"""Absolute amounts by which the fields of an accuracy may fall."""


class Finding(NamedTuple):
    """A case of both reports: its place, the verdict, and the numbers."""

    place: str
    verdict: Verdict
    detail: str


def compare_reports(
    old: Report, new: Report, time_tolerance: float = TIME_TOLERANCE
) -> list[Finding]:
    """Compare every case of two reports.

    Cases are matched by suite, group and name, without the versions of libraries: the effect of an
    update is a comparison that users want.

    Raises:
        ValueError: the reports have no case in common.
    """
    before, after = _cases(old), _cases(new)
    if before.keys().isdisjoint(after.keys()):
        raise ValueError(
            f"the reports have no case in common ({old.tag}, {len(before)} cases; {new.tag}, "
            f"{len(after)} cases): compare two of the same suites and bundle"
        )
    findings = []
    for place, case in before.items():
        if place in after:
            findings += _compare(place, case, after[place], time_tolerance)
        else:
            findings.append(Finding(place, Verdict.REMOVED, "not in the new report"))
    added = {place: case for place, case in after.items() if place not in before}
    return findings + [Finding(place, Verdict.NEW, case.error) for place, case in added.items()]


def machine_differences(old: Report, new: Report) -> list[str]:
    """Describe the differences between the two machines."""
    pairs = (
        (field, str(getattr(old.machine, field)), str(getattr(new.machine, field)))
        for field in ("processor", "cores", "gpu", "driver")
    )
    return [f"{field}: {was} then, {now} now" for field, was, now in pairs if was != now]


def _cases(report: Report) -> dict[str, CaseResult]:
    return {
        f"{group.suite} / {group.name} / {_without_versions(case.name)}": case
        for group in report.groups
        for case in group.cases
    }


def _without_versions(name: str) -> str:
    words = (word.rstrip(",") for word in name.split())
    return " ".join(w for w in words if not (w[0].isdigit() and w.count(".") >= 1))


def _compare(place: str, old: CaseResult, new: CaseResult, tolerance: float) -> list[Finding]:
    if new.error and not old.error:
        return [Finding(place, Verdict.FAILS, new.error)]
    if old.error:
        return [Finding(place, Verdict.SAME if new.error else Verdict.FIXED, new.error)]
    findings = []
    if old.latency is not None and new.latency is not None:
        findings.append(_compare_times(place, old.latency, new.latency, tolerance))
    was, now = old.peak_bytes, new.peak_bytes
    if was and now and now > was * (1 + MEMORY_TOLERANCE):
        detail = f"{format_bytes(was)} -> {format_bytes(now)}"
        findings.append(Finding(place, Verdict.MORE_MEMORY, detail))
    for name, allowed in ACCURACY_TOLERANCES.items():
        first, second = getattr(old.accuracy, name, None), getattr(new.accuracy, name, None)
        if first is not None and (second is None or second < first - allowed):
            shown = "none" if second is None else f"{second:.5f}"
            detail = f"{name} {first:.5f} -> {shown}"
            findings.append(Finding(place, Verdict.LESS_ACCURATE, detail))
    return findings or [Finding(place, Verdict.SAME, "")]


def _compare_times(place: str, old: Latency, new: Latency, tolerance: float) -> Finding:
    change = new.p50 / old.p50 - 1
    detail = f"{format_ms(old.p50)} -> {format_ms(new.p50)} ({change:+.1%})"
    if abs(change) <= tolerance:
        return Finding(place, Verdict.SAME, detail)
    low, high = (old, new) if old.p50 < new.p50 else (new, old)
    is_apart = low.ci_high < high.ci_low
    if low.round_medians and high.round_medians:
        is_apart = is_apart and max(low.round_medians) < min(high.round_medians)
    if not is_apart:
        return Finding(place, Verdict.SAME, f"{detail}, within the noise")
    return Finding(place, Verdict.SLOWER if change > 0 else Verdict.FASTER, detail)
