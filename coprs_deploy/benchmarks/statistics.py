"""From single runs to figures that can be trusted: quantiles, intervals, ratios with a spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coprs_deploy.benchmarks.report import Latency, Ratio

MOST_SAMPLES = 120
"""How many single runs a report keeps of a row: enough to draw, and to compare."""


def summarize_runs(rounds: Sequence[Sequence[float]], clock: str = "wall") -> Latency:
    """Summarize the runs of a row.

    Args:
        rounds: milliseconds of each run, by round; at least one run in all.
        clock: what measured them.
    """
    runs = np.array([run for part in rounds for run in part])
    assert len(runs), "a row without a run has a reason instead"
    low, high = median_interval(runs)
    every = max(1, math.ceil(len(runs) / MOST_SAMPLES))
    return Latency(
        n=len(runs),
        p50=_rounded(np.median(runs)),
        p90=_rounded(np.quantile(runs, 0.9, method="higher")),
        p99=_rounded(np.quantile(runs, 0.99, method="higher")),
        minimum=_rounded(runs.min()),
        low=_rounded(low),
        high=_rounded(high),
        round_medians=tuple(_rounded(np.median(part)) for part in rounds if len(part)),
        samples=tuple(_rounded(run) for run in runs[::every]),
        clock=clock,
    )


def median_interval(runs: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Bound the median with 95 % confidence, whatever the distribution.

    The ends are order statistics whose ranks follow from the binomial distribution; with fewer than
    six runs no pair of ranks holds 95 %, and the ends are the extremes.
    """
    ordered = np.sort(np.asarray(runs, dtype=np.float64))
    count = len(ordered)
    if count < 6:
        return float(ordered[0]), float(ordered[-1])
    # The largest k with P(fewer than k of the runs are below the median) <= 2.5 %.
    total, below = 0.0, 0
    for k in range(count // 2):
        total += math.exp(
            math.lgamma(count + 1)
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            - count * math.log(2)
        )
        if total > 0.025:
            break
        below = k + 1
    below = max(1, below)
    return float(ordered[below - 1]), float(ordered[count - below])


def is_stable(rounds: Sequence[Sequence[float]], within: float) -> bool:
    """Say whether the median is known to a share of itself."""
    runs = [run for part in rounds for run in part]
    if not runs:
        return False
    low, high = median_interval(runs)
    return (high - low) / 2 <= within * float(np.median(runs))


def ratio_of_rounds(name: str, rounds: Sequence[float], baseline: Sequence[float]) -> Ratio | None:
    """Compare two rows by the rounds in which both took their turn.

    Args:
        name: of the baseline.
        rounds: medians of the row, by round.
        baseline: medians of the baseline.

    Returns:
        The ratio with its range over the rounds; None where they share none.
    """
    shared = [row / base for row, base in zip(rounds, baseline, strict=False) if base > 0]
    if not shared:
        return None
    return Ratio(
        name, _rounded(float(np.median(shared))), _rounded(min(shared)), _rounded(max(shared))
    )


def _rounded(value: float) -> float:
    """Keep six digits: finer than any clock here, and a readable file."""
    return float(f"{value:.6g}")
