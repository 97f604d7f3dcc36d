"""Protocols against a second implementation, which loops over sets of pixels."""

import random

import numpy as np
import pytest

from coprs_deploy.data.sources import open_examples
from coprs_deploy.evaluation.protocols import (
    COPRS,
    GREFCOCO,
    LISA,
    PROTOCOLS,
    SEG_ZERO,
    TARGETS,
    default_protocol,
    find_protocol,
)
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.summary import measure
from tests.unit.evaluation.fake_source import FakeSource, example_of, result_of

PIXELS = range(30)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def draw(generator):
    """Draw targets, ignored pixels, predicted masks and priors, and whether the row fails."""

    def some(most):
        start, length = generator.choice(PIXELS), generator.randint(0, most)
        return {pixel % 30 for pixel in range(start, start + length)}

    targets = [each for each in (some(14) for _ in range(generator.randint(0, 2))) if each]
    ignored = some(9) if generator.random() < 0.5 else None
    masks = [some(14) for _ in range(generator.randint(0, 2))]
    if targets and generator.random() < 0.5:  # often nearly right
        masks = [targets[0] ^ some(2), *targets[1:]]
    return targets, ignored, masks, [some(14) for _ in masks], generator.random() < 0.15


def merged(sets):
    pixels = set()
    for each in sets:
        pixels |= each
    return pixels


def expected_lisa(samples, *, empty_is_no_match, epsilon=1e-5):
    """Every mask counts; two empty ones agree."""
    ious, priors, intersections, unions = [], [], 0, 0
    for targets, ignored, masks, prior, has_failed in samples:
        gt = merged(targets) - (ignored or set())
        for kind, found in ((ious, masks), (priors, prior)):
            predicted = set() if has_failed else merged(found) - (ignored or set())
            both, either = len(gt & predicted), len(gt | predicted)
            kind.append(0.0 if has_failed else both / (either + epsilon) if either else 1.0)
            if kind is ious:
                intersections, unions = intersections + both, unions + either
    count = len(samples)
    return {
        "giou": sum(ious) / count,
        "ciou": intersections / unions,
        "prior_giou": sum(priors) / count,
        **{f"precision_at_{100 * t:.0f}": sum(i > t for i in ious) / count for t in THRESHOLDS},
    }


def expected_coprs(samples, *, empty_is_no_match):
    return expected_lisa(samples, empty_is_no_match=empty_is_no_match, epsilon=0.0)


def expected_answers(samples, *, empty_is_no_match, ignored_is_foreground, reaches):
    """Count an answer where there is no target, else the IoU; two empty masks do not agree."""
    ious, priors, intersections, unions, precise = [], [], 0, 0, []
    right, wrong, named, unnamed = 0, 0, 0, 0
    for targets, ignored, masks, prior, has_failed in samples:
        left = set() if ignored_is_foreground else (ignored or set())
        gt = merged(targets) - left
        if ignored_is_foreground:
            gt |= ignored or set()
        is_empty = not (targets or (ignored_is_foreground and ignored))
        is_no_match = is_empty and empty_is_no_match
        says_nothing = not masks and not has_failed
        predicted = set() if has_failed else merged(masks) - left
        both, either = len(gt & predicted), len(gt | predicted)
        intersections, unions = intersections + both, unions + either
        if is_no_match:
            ious.append(1.0 if says_nothing else 0.0)
            priors.append(ious[-1])
            right, wrong = right + says_nothing, wrong + (not says_nothing)
            continue
        named, unnamed = (
            named + bool(masks and not has_failed),
            unnamed + (not masks or has_failed),
        )
        ious.append(both / either if either else 0.0)
        precise.append(ious[-1])
        predicted = set() if has_failed else merged(prior) - left
        either = len(gt | predicted)
        priors.append(len(gt & predicted) / either if either else 0.0)
    metrics = {
        "giou": sum(ious) / len(ious),
        "ciou": intersections / unions,
        "prior_giou": sum(priors) / len(priors),
    }
    for threshold in THRESHOLDS:
        hits = sum(reaches(iou, threshold) for iou in precise)
        metrics[f"precision_at_{100 * threshold:.0f}"] = hits / len(precise)
    if right + wrong:
        metrics |= {"n_acc": right / (right + wrong), "t_acc": named / (named + unnamed)}
    return metrics


def expected_seg_zero(samples, *, empty_is_no_match):
    return expected_answers(
        samples,
        empty_is_no_match=empty_is_no_match,
        ignored_is_foreground=True,
        reaches=lambda iou, threshold: iou > threshold,
    )


def expected_grefcoco(samples, *, empty_is_no_match):
    return expected_answers(
        samples,
        empty_is_no_match=empty_is_no_match,
        ignored_is_foreground=False,
        reaches=lambda iou, threshold: iou >= threshold,
    )


EXPECTED = {
    "lisa": expected_lisa,
    "seg_zero": expected_seg_zero,
    "coprs": expected_coprs,
    "grefcoco": expected_grefcoco,
}


def evaluate(samples, protocol, has_no_match=True):
    examples = [example_of(i, s[0], s[1]) for i, s in enumerate(samples)]
    source = FakeSource(examples, has_no_match=has_no_match)

    def segment(image, instruction, max_targets):
        _, _, masks, priors, has_failed = samples[int(instruction)]
        if has_failed:
            raise RuntimeError("out of memory")
        return result_of(masks, priors)

    task = EvaluationTask("fake", source, 2, protocol)
    return [task.evaluate(index, segment) for index in range(len(examples))]


@pytest.mark.parametrize("has_no_match", [True, False])
@pytest.mark.parametrize("name", EXPECTED)
def test_protocol_agrees_with_loops_over_pixels(name, has_no_match):
    generator = random.Random(f"{name} {has_no_match}")
    seen = set()
    for _ in range(15):
        samples = [draw(generator) for _ in range(40)]
        rows = evaluate(samples, find_protocol(name), has_no_match)
        metrics = measure(rows, find_protocol(name))
        expected = EXPECTED[name](samples, empty_is_no_match=has_no_match)
        seen |= {(bool(s[0]), bool(s[1]), bool(s[2]), s[4]) for s in samples}
        assert {*metrics} - {"pearson_r"} == set(expected)
        for metric, value in expected.items():
            assert metrics[metric].value == pytest.approx(value, abs=1e-9, rel=0), metric
    assert len(seen) == 16, "a case was never drawn"


def test_targets_counts_no_match_examples_apart():
    samples = [
        ([{0, 1}], None, [{0, 1}], [{0}], False),
        ([], None, [], [], False),
        ([], None, [{3}], [{3}], False),
        ([{4}], None, [{4, 5}], [{4}], True),
        ([{4}], None, [], [], False),
    ]
    metrics = {
        name: each.value for name, each in measure(evaluate(samples, TARGETS), TARGETS).items()
    }
    assert metrics["giou"] == pytest.approx(1 / 3)
    assert metrics["ciou"] == pytest.approx(2 / 4), "a failed row has its ground truth in the cIoU"
    assert metrics["no_match_recall"] == 1 / 2
    assert metrics["no_match_precision"] == 1 / 2, "a failed row is no answer"


def test_ciou_of_empty_masks_alone_is_the_value_of_the_protocol():
    samples = [([], None, [], [], False)] * 2
    for protocol in (LISA, COPRS, GREFCOCO, SEG_ZERO):
        metrics = measure(evaluate(samples, protocol), protocol)
        assert metrics["ciou"].value == protocol.empty_iou
        assert metrics["giou"].value == 1
    assert measure(evaluate(samples, TARGETS), TARGETS).keys() == {
        "no_match_recall",
        "no_match_precision",
    }


@pytest.mark.parametrize(
    ("protocol", "is_reference", "text", "expected"),
    [
        (LISA, True, " The RED cup? ", "the red cup?"),
        (LISA, False, " Where is the CUP? ", "Where is the CUP?"),
        (SEG_ZERO, True, 'The "red cup"?!', 'the "red cup'),
        (SEG_ZERO, False, "Where is it? ", "where is it? "),
        (COPRS, True, "The Cup.", "The Cup."),
        (GREFCOCO, True, "The Cup", "The Cup"),
        (TARGETS, False, " The Cup ", " The Cup "),
    ],
)
def test_instruction_is_changed_as_in_the_published_evaluation(
    protocol, is_reference, text, expected
):
    assert protocol.instruction(text, is_reference=is_reference) == expected


def test_row_has_the_instruction_that_the_model_got():
    example = example_of(0, [{1}])
    object.__setattr__(example, "instruction", "The CUP.")
    requested = []

    def segment(image, instruction, max_targets):
        requested.append(instruction)
        return result_of([{1}], [{1}])

    for has_references, expected in ((True, "the cup."), (False, "The CUP.")):
        source = FakeSource([example], has_references=has_references)
        row = EvaluationTask("fake", source, 1, LISA).evaluate(0, segment)
        assert row.instruction == requested[-1] == expected


def test_default_protocol_is_that_of_the_data_set():
    assert default_protocol(open_examples("synthetic:plain", 1, 0).examples) == TARGETS
    assert default_protocol(FakeSource([])) == LISA
    assert default_protocol(FakeSource([], has_references=True, has_no_match=False)) == LISA
    assert default_protocol(FakeSource([], has_references=True)) == GREFCOCO


def test_unknown_protocol_is_refused_with_the_names():
    assert [find_protocol(name).name for name in PROTOCOLS] == [*PROTOCOLS]
    with pytest.raises(ValueError, match="protocol is 'liza'; accepted: lisa, seg_zero, coprs"):
        find_protocol("liza")


def test_pearson_r_leaves_out_failed_and_no_match_rows():
    generator = random.Random(1)
    samples = [draw(generator) for _ in range(200)]
    rows = evaluate(samples, LISA)
    counted = [s for s in samples if s[0] and not s[4]]
    pairs = []
    for sample in counted:
        alone = expected_lisa([sample, ([{0}], None, [{0}], [{0}], False)], empty_is_no_match=True)
        other = 1 / (1 + 1e-5)
        pairs.append((2 * alone["prior_giou"] - other, 2 * alone["giou"] - other))
    x, y = np.array(pairs).T
    x, y = x - x.mean(), y - y.mean()
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert measure(rows, LISA)["pearson_r"].value == pytest.approx(expected, abs=1e-9)
