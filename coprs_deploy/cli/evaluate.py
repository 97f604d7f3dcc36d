"""Evaluate a bundle end to end on held-out synthetic scenes, a data set, or a file of examples.

Each example goes through the runtime like a user's request. --out writes a report page, a plot of
prior IoU against mask IoU, and all predictions. The exit code is 1 if a metric is below its
--require threshold, or undefined.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.artifacts import check_writable
from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.cli.runtime_arguments import GRAPHS, add_bundle_argument, open_runtime
from coprs_deploy.console import StepPrinter, table
from coprs_deploy.data.examples import Example
from coprs_deploy.data.readers.registry import SourceOptions
from coprs_deploy.data.sources import DEFAULT_NUM_NO_MATCH, SYNTHETIC, ExampleSet, open_examples
from coprs_deploy.errors import ImageSizeError
from coprs_deploy.evaluation.evaluator import evaluate, predict_with
from coprs_deploy.evaluation.metrics import summarize
from coprs_deploy.evaluation.plots import pyplot
from coprs_deploy.evaluation.report import write_evaluation
from coprs_deploy.evaluation.thresholds import check_thresholds, failed_thresholds, parse_thresholds
from coprs_deploy.runtime import CoPRS, RuntimeOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    add_bundle_argument(parser)
    parser.add_argument(
        "--examples",
        metavar="SOURCE",
        help="example file or data set, as in refcoco:testA (default: held-out scenes)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of the public data sets (default: $COPRS_DEPLOY_DATA, or the current folder)",
    )
    parser.add_argument("--preset", help="difficulty preset of the scenes: plain (default) or full")
    parser.add_argument(
        "--num-examples",
        type=int,
        help="number of examples with a target (default: 256 scenes, or the whole file)",
    )
    parser.add_argument("--num-no-match", type=int, help="number of no-match scenes (default: 64)")
    parser.add_argument(
        "--first-seed",
        type=int,
        help="seed of the first held-out scene (default: 0, as in the training reports)",
    )
    parser.add_argument(
        "--out", type=Path, help="directory for report.md, predictions.jsonl and the plot"
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="acceptance threshold, as in giou=0.93; may be repeated",
    )
    add_options(parser, RuntimeOptions, GRAPHS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the metrics, and check the thresholds."""
    thresholds = parse_thresholds(arguments.require)
    if arguments.out:  # whatever prevents the report is found before the work
        check_writable(arguments.out)
        pyplot()
    options = read_options(arguments, RuntimeOptions, GRAPHS)
    dataset = _open_examples(arguments)
    check_thresholds(thresholds, dataset.question_types, dataset.num_no_match)
    if arguments.out:  # whatever prevents the report is found before the work
        pyplot()
        check_writable(arguments.out)
    count = len(dataset.examples)
    with open_runtime(arguments.bundle, options) as coprs, StepPrinter() as steps:
        _check_images(dataset.examples, coprs)
        predict = predict_with(coprs.segment, dataset.max_targets)
        steps("evaluate")
        scores = evaluate(
            predict,
            dataset.examples,
            on_progress=lambda done: steps.progress(f"{done} of {count} examples"),
        )
    metrics = summarize(scores)
    failed = failed_thresholds(metrics, thresholds)
    if arguments.out:
        write_evaluation(arguments.out, dataset.description, scores)
    report = {**dataset.to_json(), "metrics": metrics, "failed_thresholds": failed}
    rows = [(name, f"{value:.4f}") for name, value in metrics.items()]
    print_result(arguments, report, table((dataset.description, ""), rows))
    for line in failed:
        log(line)
    return 1 if failed else 0


def _open_examples(arguments: argparse.Namespace) -> ExampleSet:
    """Open the source, or the scenes; options of scenes are refused with a source."""
    scenes: dict[str, Any] = {
        "preset": "plain",
        "num_no_match": DEFAULT_NUM_NO_MATCH,
        "first_seed": 0,
    }
    given = [name for name in scenes if getattr(arguments, name) is not None]
    if arguments.examples and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags} select synthetic scenes; leave out either these or --examples")
    if arguments.root and not arguments.examples:
        raise ValueError("--root is the folder of data sets; name one with --examples")
    if arguments.examples:
        options = SourceOptions(arguments.root)
        return open_examples(arguments.examples, arguments.num_examples, options=options)
    scenes |= {name: getattr(arguments, name) for name in given}
    source = f"{SYNTHETIC}{scenes.pop('preset')}"
    return open_examples(source, arguments.num_examples, **scenes)


def _check_images(examples: Sequence[Example], coprs: CoPRS) -> None:
    """Check all images against the bundle's valid region before the first prediction."""
    refused = []
    for example in examples:
        try:
            coprs.check_image(example.image)
        except ImageSizeError as error:
            refused.append(f"{example.id}: {error}")
    if refused:
        raise ImageSizeError(
            f"the bundle does not accept {len(refused)} of {len(examples)} images; the first is "
            f"{refused[0]}. Synthetic scenes are square: evaluate a bundle with a fixed aspect "
            "ratio on --examples of that aspect ratio"
        )
