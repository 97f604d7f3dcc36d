"""Robust summary statistics for timings: quantiles, intervals of the median, ratios by round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from coprs_deploy.bench.report import Latency, Ratio

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
    """Compare the round medians of a case with those of the baseline of that name.

    Returns:
        The ratio with its range over the rounds; None without a common round.
    """
    shared = [case / base for case, base in zip(rounds, baseline, strict=False) if base > 0]
    if not shared:
        return None
    return Ratio(name, *map(rounded, (float(np.median(shared)), min(shared), max(shared))))


def rounded(value: float) -> float:
    """Keep six digits: finer than any clock here, and a readable file."""
    return float(f"{value:.6g}")
