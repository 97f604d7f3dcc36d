"""Quantiles, the confidence interval of the median, ratios by round."""

import numpy as np
import pytest

from coprs_deploy.bench.report import (
    MAX_SAMPLES,
    is_stable,
    median_interval,
    ratio_of_rounds,
    summarize_runs,
)


def test_quantiles_are_values_that_were_measured():
    latency = summarize_runs([list(range(1, 51)), list(range(51, 101))])
    assert (latency.n, latency.p50, latency.minimum) == (100, 50.5, 1)
    assert (latency.p90, latency.p99) == (91, 100)
    assert latency.round_medians == (25.5, 75.5)


def test_many_samples_are_thinned_evenly_and_still_counted():
    latency = summarize_runs([[float(i) for i in range(1000)]])
    assert latency.n == 1000
    assert len(latency.samples) <= MAX_SAMPLES
    assert latency.samples[:2] == (0, 9)
    assert latency.samples[-1] > 980


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (20, 6), (100, 40), (500, 228)])
def test_the_interval_of_a_median_has_the_textbook_ranks(count, rank):
    runs = np.arange(1, count + 1)
    assert median_interval(runs) == (rank, count + 1 - rank)


def test_with_few_runs_the_interval_is_their_range():
    assert median_interval([3.0, 1.0, 2.0]) == (1, 3)
    assert median_interval([3.0]) == (3, 3)


def test_the_interval_covers_the_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = median_interval(generator.lognormal(size=40))
        hits += low <= 1.0 <= high
    assert 940 <= hits <= 990


def test_stability_covers_all_rounds():
    assert is_stable([[10.0] * 5, [10.1] * 5], within=0.01)
    assert not is_stable([[10.0] * 5, [12.0] * 5], within=0.01)
    assert not is_stable([], within=0.5)


def test_a_ratio_has_its_range_over_the_rounds():
    ratio = ratio_of_rounds("base", [2.0, 3.0, 4.0], [1.0, 1.0, 4.0])
    assert (ratio.value, ratio.low, ratio.high) == (2, 1, 3)
    assert ratio_of_rounds("base", [], [1.0]) is None
