"""Robust summary statistics for timings: quantiles, intervals of the median, ratios by round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coprs_deploy.bench.report import Latency, Ratio

MAX_SAMPLES = 120
"""Number of single runs that a report keeps of a case."""


def summarize_runs(rounds: Sequence[Sequence[float]], clock: str = "wall") -> Latency:
    """Summarize the milliseconds of a case's runs, by round; ``clock`` names what measured them."""
    runs = np.array([run for part in rounds for run in part])
    assert len(runs), "a case without a run has an error instead"
    low, high = median_interval(runs)
    return Latency(
        n=len(runs),
        p50=_rounded(np.median(runs)),
        p90=_rounded(np.quantile(runs, 0.9, method="higher")),
        p99=_rounded(np.quantile(runs, 0.99, method="higher")),
        minimum=_rounded(runs.min()),
        ci_low=_rounded(low),
        ci_high=_rounded(high),
        round_medians=tuple(_rounded(np.median(part)) for part in rounds if len(part)),
        samples=tuple(_rounded(run) for run in runs[:: math.ceil(len(runs) / MAX_SAMPLES)]),
        clock=clock,
    )


def median_interval(runs: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the distribution-free 95 % confidence interval of the median.

    Its ends are order statistics whose ranks follow from the binomial distribution. With fewer than
    six runs no pair of ranks holds 95 %, and the ends are the extremes.
    """
    ordered = np.sort(np.asarray(runs, dtype=np.float64))
    count = len(ordered)
    if count < 6:
        return float(ordered[0]), float(ordered[-1])
    # The largest k with P(fewer than k of the runs are below the median) <= 2.5 %.
    total, below, log_runs = 0.0, 0, math.lgamma(count + 1) - count * math.log(2)
    for k in range(count // 2):
        total += math.exp(log_runs - math.lgamma(k + 1) - math.lgamma(count - k + 1))
        if total > 0.025:
            break
        below = k + 1
    below = max(1, below)
    return float(ordered[below - 1]), float(ordered[count - below])


def is_stable(rounds: Sequence[Sequence[float]], within: float) -> bool:
    """Whether the median's interval is within a share of the median."""
    runs = [run for part in rounds for run in part]
    if not runs:
        return False
    low, high = median_interval(runs)
    return (high - low) / 2 <= within * float(np.median(runs))


def ratio_of_rounds(name: str, rounds: Sequence[float], baseline: Sequence[float]) -> Ratio | None:
    """Compare the round medians of a case with those of the baseline of that name.

    Returns:
        The ratio with its range over the rounds; None without a common round.
    """
    shared = [case / base for case, base in zip(rounds, baseline, strict=False) if base > 0]
    if not shared:
        return None
    return Ratio(name, *map(_rounded, (float(np.median(shared)), min(shared), max(shared))))


def _rounded(value: float) -> float:
    """Keep six digits: finer than any clock here, and a readable file."""
    return float(f"{value:.6g}")
