"""Comparison of two reports: what became slower, larger or less accurate, beyond the noise.

A case is slower when the new median exceeds the old one by more than the tolerance, and neither the
two 95 % intervals of the medians overlap nor the ranges of their medians by round.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from coprs_deploy.bench.report import CaseResult, Latency, Report
from coprs_deploy.console import format_bytes, format_ms

REGRESSIONS = ("slower", "more_memory", "less_accurate", "fails")
"""Verdicts that set the exit code; the others: same, faster, fixed, new, removed."""

TIME_TOLERANCE, MEMORY_TOLERANCE = 0.05, 0.10
"""Shares of the old median and of the old peak by which they may grow."""

ACCURACY_TOLERANCES = {
    "mask_iou_mean": 0.005,
    "giou": 0.005,
    "precision_at_50": 0.01,
    "embedding_cosine": 0.001,
    "concentration_cosine": 0.001,
}
"""Absolute amounts by which the fields of an accuracy may fall."""


VERSION = re.compile(r" \d\S*\.[^\s,]*|,")
"""What is taken out of the names of cases: versions, and commas."""


class Finding(NamedTuple):
    """A case of both reports: its place, the verdict, and the numbers."""

    place: str
    verdict: str
    detail: str


def compare_reports(old: Report, new: Report, tolerance: float = TIME_TOLERANCE) -> list[Finding]:
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
    return [
        Finding(place, *verdict)
        for place in dict.fromkeys([*before, *after])
        for verdict in _compare(before.get(place), after.get(place), tolerance)
    ]


def machine_differences(old: Report, new: Report) -> list[str]:
    """Describe the differences between the two machines."""
    fields = ("processor", "cores", "gpu", "driver")
    pairs = [(name, getattr(old.machine, name), getattr(new.machine, name)) for name in fields]
    return [f"{name}: {was} then, {now} now" for name, was, now in pairs if was != now]


def _cases(report: Report) -> dict[str, CaseResult]:
    return {
        f"{group.suite} / {group.name} / {VERSION.sub('', case.name)}": case
        for group in report.groups
        for case in group.cases
    }


def _compare(
    old: CaseResult | None, new: CaseResult | None, tolerance: float
) -> list[tuple[str, str]]:
    """Return verdicts with their numbers."""
    if new is None:
        return [("removed", "not in the new report")]
    if old is None:
        return [("new", new.error)]
    if old.error or new.error:
        verdict = "fixed" if not new.error else "same" if old.error else "fails"
        return [(verdict, new.error)]
    found = []
    if old.latency is not None and new.latency is not None:
        found.append(_compare_times(old.latency, new.latency, tolerance))
    was, now = old.peak_bytes, new.peak_bytes
    if was and now and now > was * (1 + MEMORY_TOLERANCE):
        found.append(("more_memory", f"{format_bytes(was)} -> {format_bytes(now)}"))
    for name, allowed in ACCURACY_TOLERANCES.items():
        first, second = getattr(old.accuracy, name, None), getattr(new.accuracy, name, None)
        if first is not None and (second is None or second < first - allowed):
            shown = "none" if second is None else f"{second:.5f}"
            found.append(("less_accurate", f"{name} {first:.5f} -> {shown}"))
    return found or [("same", "")]


def _compare_times(old: Latency, new: Latency, tolerance: float) -> tuple[str, str]:
    change = new.p50 / old.p50 - 1
    detail = f"{format_ms(old.p50)} -> {format_ms(new.p50)} ({change:+.1%})"
    if abs(change) <= tolerance:
        return "same", detail
    low, high = (old, new) if old.p50 < new.p50 else (new, old)
    is_apart = low.ci_high < high.ci_low
    if low.round_medians and high.round_medians:
        is_apart = is_apart and max(low.round_medians) < min(high.round_medians)
    if not is_apart:
        return "same", f"{detail}, within the noise"
    return "slower" if change > 0 else "faster", detail
