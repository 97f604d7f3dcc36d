"""Acceptance thresholds: parsing, metrics that the data do not define, comparison."""

import pytest

from coprs_deploy.evaluation.protocols import GREFCOCO, LISA
from coprs_deploy.evaluation.rows import EvaluationRow, MaskCounts
from coprs_deploy.evaluation.summary import measure, summarize
from coprs_deploy.evaluation.thresholds import (
    METRICS,
    check_thresholds,
    failed_thresholds,
    parse_thresholds,
)


def test_thresholds_are_read_by_metric_and_question_type():
    settings = ["giou=0.93", " ordinal.precision_at_50 = 1 ", "pearson_r=-0.5", "ciou=0"]
    expected = {"giou": 0.93, "ordinal.precision_at_50": 1.0, "pearson_r": -0.5, "ciou": 0.0}
    assert parse_thresholds(settings) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("miou=0.2", r"metric of 'miou=0.2' is 'miou'; accepted: giou, .*; did you mean giou\?"),
        ("precision_at50=0.2", r"did you mean precision_at_50\?"),
        ("ordinal.gio=0.2", r"did you mean ordinal.giou\?"),
        ("ordinal.pearson_r=0.2", "accepted: .*TYPE.METRIC for giou, ciou, precision_at_50"),
        (".giou=0.2", "is '.giou'"),
        ("0.93", "is '0.93'"),
        ("=0.93", "is ''"),
        ("giou", "'giou' has no number; accepted: METRIC=VALUE, as in giou=0.93"),
        ("giou=", "has no number"),
        ("giou=high", "has no number"),
        ("giou=0.9=0.8", "has no number"),
        ("giou=-0.1", "giou is required to be -0.1; accepted: 0 to 1"),
        ("giou=93", "accepted: 0 to 1"),
        ("giou=nan", "accepted: 0 to 1"),
        ("giou=inf", "accepted: 0 to 1"),
        ("pearson_r=-1.1", "accepted: -1 to 1"),
    ],
)
def test_threshold_that_cannot_be_meant_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        parse_thresholds(["ciou=0.5", setting])


def test_two_thresholds_of_one_metric_are_refused():
    with pytest.raises(ValueError, match=r"giou has two thresholds, 0.9 and 0.5"):
        parse_thresholds(["giou=0.9", "giou=0.5"])


@pytest.mark.parametrize(
    ("name", "question_types", "num_no_match", "reason"),
    [
        ("giou", (), 3, "there is no example with a target"),
        ("pearson_r", ("ordinal",), 3, "at least two examples with a target"),
        ("no_match_recall", ("ordinal",), 0, "there is no no-match example"),
        ("no_match_precision", ("ordinal",), 0, "there is no no-match example"),
        ("nearest.giou", ("ordinal", "", "several"), 1, "question types: ordinal, several"),
        ("nearest.giou", ("", ""), 1, "question types: none"),
    ],
)
def test_metric_that_the_examples_do_not_define_is_refused(
    name, question_types, num_no_match, reason
):
    with pytest.raises(ValueError, match=f"{name} is undefined for these examples: .*{reason}"):
        check_thresholds({name: 0.5}, question_types, num_no_match)


def test_metrics_of_complete_examples_are_accepted():
    known = set(METRICS) - {"n_acc", "t_acc"}
    thresholds = {**dict.fromkeys(known, 0.5), "ordinal.giou": 0.5}
    check_thresholds(thresholds, ("ordinal", "", "several"), 1)
    check_thresholds({"n_acc": 0.5, "t_acc": 0.5}, ("a",), 1, GREFCOCO)


@pytest.mark.parametrize(
    ("name", "protocol", "question_types", "num_no_match", "reason"),
    [
        ("n_acc", LISA, ("a",), 1, "the protocol lisa does not have it"),
        ("no_match_recall", GREFCOCO, ("a",), 1, "the protocol grefcoco does not have it"),
        ("t_acc", GREFCOCO, ("a",), 0, "there is no no-match example"),
        ("t_acc", GREFCOCO, (), 2, "there is no example with a target"),
    ],
)
def test_metric_that_the_protocol_does_not_define_is_refused(
    name, protocol, question_types, num_no_match, reason
):
    with pytest.raises(ValueError, match=reason):
        check_thresholds({name: 0.5}, question_types, num_no_match, protocol)


def scores(*found):
    """Score one no-match example and one example per number: predicted masks and their IoU."""
    present = [row(1, 1, (n, 10), (1, 2)) for n in found]
    return [row(0, 1, (0, 5), (1, 2)), *present]


def row(num_targets, num_found, mask, prior):
    return EvaluationRow(
        index=0,
        id="a",
        num_targets=num_targets,
        num_found=num_found,
        mask=MaskCounts(*mask, 0, 0),
        prior=MaskCounts(*prior, 0, 0),
    )


def test_every_metric_that_can_be_required_is_computed():
    found = scores(4, 8)
    found += [row(0, 0, (0, 0), (0, 0)), row(1, 1, (1, 2), (3, 4))]
    assert {*summarize(found), *measure(found, GREFCOCO)} == set(METRICS)


def test_metrics_below_their_threshold_fail():
    metrics = summarize(scores(4, 8))
    assert metrics["giou"] == pytest.approx(0.6)
    assert failed_thresholds(metrics, {"giou": 0.59, "no_match_recall": 0.0}) == []
    assert failed_thresholds(metrics, {"giou": 0.61, "ciou": 0.6}) == [
        "giou is 0.6000; required: 0.61"
    ]


def test_metric_that_the_predictions_do_not_define_fails_with_the_reason():
    metrics = summarize(scores(4, 8))
    required = {"no_match_precision": 0.0, "pearson_r": -1.0}
    assert failed_thresholds(metrics, required) == [
        "no_match_precision is undefined: every example got a mask; required: 0",
        "pearson_r is undefined: the IoU of all priors, or of all masks, is the same; required: -1",
    ]


def test_metric_that_no_decoded_example_defines_fails():
    """The masks of all examples with a target may turn out to cover no pixel."""
    metrics = summarize(scores())
    assert failed_thresholds(metrics, {"giou": 0.5, "no_match_recall": 0.5}) == [
        "giou is undefined: no example that was decoded defines it; required: 0.5",
        "no_match_recall is 0.0000; required: 0.5",
    ]
