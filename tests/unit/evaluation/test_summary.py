"""Groups and confidence intervals of an evaluation."""

import numpy as np
import pytest

from coprs_deploy.evaluation.protocols import COPRS, GREFCOCO
from coprs_deploy.evaluation.rows import EvaluationRow, MaskCounts
from coprs_deploy.evaluation.summary import flat_summary, group_rows, measure, summarize_dataset


def row(index, intersection=1, union=2, **others):
    counts = MaskCounts(intersection, union, union, others.pop("ground_truth", intersection))
    fields = {"num_targets": 1, "num_found": 1, "mask": counts, "prior": counts} | others
    return EvaluationRow(index=index, id=str(index), **fields)


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    generator = np.random.default_rng(0)
    rows = [row(i, int(value), 1000) for i, value in enumerate(generator.integers(0, 1000, 2000))]
    ious = [each.mask.intersection / 1000 for each in rows]
    low, high = measure(rows, COPRS, 8000)["giou"].interval
    half = 1.96 * np.std(ious) / np.sqrt(len(rows))
    assert low == pytest.approx(np.mean(ious) - half, abs=half / 20)
    assert high == pytest.approx(np.mean(ious) + half, abs=half / 20)


def test_interval_of_a_ratio_is_that_of_a_loop_over_resamples():
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 1000, 60)
    rows = [row(i, int(size * generator.random()), int(size)) for i, size in enumerate(sizes)]
    ratios = []
    for _ in range(4000):
        drawn = [rows[i].mask for i in generator.integers(0, 60, 60)]
        ratios.append(sum(c.intersection for c in drawn) / sum(c.union for c in drawn))
    low, high = measure(rows, COPRS, 4000)["ciou"].interval
    expected = np.quantile(ratios, (0.025, 0.975))
    assert (low, high) == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_interval_draws_images_and_not_their_sentences():
    rows = [row(i, i, 40, image=f"image {i}") for i in range(40)]
    tripled = [row(3 * i + n, i, 40, image=f"image {i}") for i in range(40) for n in range(3)]
    once, thrice = (measure(each, COPRS, 500) for each in (rows, tripled))
    assert once["giou"] == thrice["giou"] and once["ciou"] == thrice["ciou"]
    independent = [row(each.index, each.mask.intersection, 40) for each in tripled]
    low, high = measure(independent, COPRS, 500)["giou"].interval
    assert high - low < 0.7 * (once["giou"].interval[1] - once["giou"].interval[0])


def test_interval_is_the_same_each_time_and_absent_for_one_image():
    rows = [row(i, i, 40) for i in range(40)]
    assert measure(rows, COPRS, 300) == measure(rows, COPRS, 300)
    assert measure(rows[:1], COPRS, 300)["giou"].interval is None


def test_interval_leaves_out_resamples_without_a_no_match_example():
    rows = [row(0, num_targets=0, num_found=0), *(row(i) for i in range(1, 4))]
    assert measure(rows, GREFCOCO, 200)["n_acc"].interval == (1, 1)


def test_rows_are_grouped_by_type_length_size_and_class():
    rows = [
        row(0, question_type="short", ground_truth=32**2 - 1, num_same_class=0),
        row(1, question_type="long", ground_truth=32**2, num_same_class=2),
        row(2, question_type="relation", ground_truth=96**2, num_same_class=3),
        row(3, question_type="relation", ground_truth=96**2 - 1, num_same_class=9),
        row(4, ground_truth=0),
        row(5, mask=None, prior=None, error="E: x", question_type="long"),
    ]
    groups = group_rows(rows)
    found = {
        name: {group: [each.index for each in part] for group, part in parts.items()}
        for name, parts in groups.items()
    }
    assert found == {
        "question_type": {"relation": [2, 3]},
        "query_length": {"long": [1, 5], "short": [0]},
        "object_size": {"small": [0], "medium": [1, 3], "large": [2]},
        "num_same_class": {"0": [0], "2": [1], "3+": [2, 3]},
    }


def test_summary_counts_rows_images_and_failures_and_keeps_metrics_of_groups():
    rows = [
        row(0, question_type="long", image="a"),
        row(1, question_type="long", image="a", error="E: x", num_found=0),
        row(2, 2, 2, image="b"),
    ]
    summary = summarize_dataset(rows, COPRS)
    assert (summary.protocol, summary.num_rows, summary.num_images) == ("coprs", 3, 2)
    assert summary.num_failed == 1
    assert summary.metrics["giou"].value == (0.5 + 0 + 1) / 3
    assert summary.groups["query_length"]["long"].num_rows == 2
    assert "question_type" not in summary.groups
    flat = flat_summary(summary)
    assert flat["long.giou"] == 0.25 and flat["giou"] == 0.5
