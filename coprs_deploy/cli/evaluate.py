"""Evaluate a bundle end to end on held-out synthetic scenes, data sets, or files of examples.

Each example goes through the runtime like a user's request. --out keeps every finished row: the
same command, run again after an interruption, continues. The exit code is 1 if a metric is below
its --require threshold, or undefined.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from coprs_deploy import demo
from coprs_deploy.artifacts import check_writable, temporary_directory, write_json
from coprs_deploy.bundle import hash_manifest, read_manifest
from coprs_deploy.cli.evaluation_workers import EvaluationJob, make_shares
from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.cli.report_arguments import add_report_arguments, read_judge
from coprs_deploy.cli.runtime_arguments import GRAPHS, POLICY, add_bundle_argument
from coprs_deploy.console import StepPrinter, table
from coprs_deploy.data.readers.registry import SourceOptions
from coprs_deploy.data.sources import DEFAULT_NUM_NO_MATCH, SYNTHETIC, ExampleSet, open_examples
from coprs_deploy.errors import check_number
from coprs_deploy.evaluation.evaluator import Segment
from coprs_deploy.evaluation.judge import JudgeReport, JudgeSettings
from coprs_deploy.evaluation.protocols import PROTOCOLS, default_protocol, find_protocol
from coprs_deploy.evaluation.reports.plots import pyplot
from coprs_deploy.evaluation.reports.report import EvaluatedDataset, ReportOptions, write_report
from coprs_deploy.evaluation.reports.report_parts import metric_rows
from coprs_deploy.evaluation.runner import EvaluationTask
from coprs_deploy.evaluation.store import EvaluationStore, RowFile, evaluation_identity
from coprs_deploy.evaluation.summary import flat_summary, summarize_dataset
from coprs_deploy.evaluation.thresholds import check_thresholds, failed_thresholds, parse_thresholds
from coprs_deploy.hub import local_bundle
from coprs_deploy.runtime import RuntimeOptions

SPEED_FILE = "speed.json"

PRINTED_BY_TYPE = ("giou", "ciou", "precision_at_50", "prior_giou")
"""Metrics by question type that are printed; the report has all of them."""

OPTIONS_OF_RESULTS = (
    *("runtime", "inference_precision", "device", "cuda_graphs"),
    *("policy", "policy_device", "policy_dtype", "prompt_lookup_num_tokens", "vllm"),
)
"""Options of the runtime that belong to the identity of an evaluation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    add_bundle_argument(parser)
    _add_data_arguments(parser)
    parser.add_argument(
        "--protocol",
        help=f"how sentences, pixels and rows are counted: {', '.join(PROTOCOLS)} (default: lisa; "
        "grefcoco for gRefCOCO, targets for scenes and example files)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="number of processes, each with a GPU of its own "
        "or its part of the cores (default: 1)",
    )
    parser.add_argument(
        "--out", type=Path, help="directory for rows, metrics and report; resumed if it exists"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the rows of another evaluation in --out"
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="acceptance threshold, as in giou=0.93; may be repeated",
    )
    add_report_arguments(parser)
    add_options(parser, RuntimeOptions, (*GRAPHS, *POLICY))


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        metavar="SOURCE",
        nargs="+",
        action="extend",
        help="data sets, as in refcoco:testA, or example files (default: held-out scenes)",
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
        help="number of examples with a target (default: 256 scenes, or the whole data set)",
    )
    parser.add_argument("--num-no-match", type=int, help="number of no-match scenes (default: 64)")
    parser.add_argument(
        "--first-seed",
        type=int,
        help="seed of the first held-out scene (default: 0, as in the training reports)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the metrics, and check the thresholds."""
    thresholds = parse_thresholds(arguments.require)
    check_number("workers", arguments.workers, least=1)
    if arguments.overwrite and not arguments.out:
        raise ValueError("--overwrite removes the rows in --out; name that directory")
    judge = read_judge(arguments)
    if arguments.out:  # whatever prevents the report is found before the work
        check_writable(arguments.out)
        pyplot()
    options = read_options(arguments, RuntimeOptions, (*GRAPHS, *POLICY))
    datasets = _open_datasets(arguments)
    for opened in datasets:
        examples = opened.examples
        check_thresholds(
            thresholds, examples.question_types, examples.num_no_match, opened.task.protocol
        )
    tasks = [opened.task for opened in datasets]
    bundle = local_bundle(arguments.bundle) if arguments.bundle else None
    manifest = read_manifest(bundle or demo.BUNDLE)
    kept = {name: asdict(options)[name] for name in OPTIONS_OF_RESULTS}
    identity = evaluation_identity(hash_manifest(manifest.to_json()), tasks, kept)
    job = EvaluationJob(bundle, options, tasks)
    with ExitStack() as stack:
        directory = arguments.out or stack.enter_context(temporary_directory("coprs-evaluate-"))
        overwrite = arguments.overwrite
        store = stack.enter_context(EvaluationStore.open(directory, identity, overwrite=overwrite))
        files = [store.row_file(task) for task in tasks]
        with _kept_rows(files, arguments.out):
            speed = _evaluate(job, files, arguments.workers)
        evaluated = _finish(store, datasets, files)
        outcome = _report(arguments, job, identity, evaluated, judge=judge, speed=speed)
    code = _print(arguments, datasets, evaluated, thresholds, speed)
    if outcome is not None and outcome.error:
        log(f"the judge gave up: {outcome.error}")
        return 1
    return code


@dataclass(frozen=True, eq=False)
class _OpenedDataset:
    examples: ExampleSet
    task: EvaluationTask


def _open_datasets(arguments: argparse.Namespace) -> list[_OpenedDataset]:
    """Open the sources, or the scenes; options of scenes are refused with a source."""
    scenes: dict[str, Any] = {
        "preset": "plain",
        "num_no_match": DEFAULT_NUM_NO_MATCH,
        "first_seed": 0,
    }
    protocol = find_protocol(arguments.protocol) if arguments.protocol else None
    given = [name for name in scenes if getattr(arguments, name) is not None]
    if arguments.dataset and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags} select synthetic scenes; leave out either these or --dataset")
    if arguments.root and not arguments.dataset:
        raise ValueError("--root is the folder of data sets; name one with --dataset")
    scenes |= {name: getattr(arguments, name) for name in given}
    sources = arguments.dataset or [f"{SYNTHETIC}{scenes.pop('preset')}"]
    if arguments.dataset:
        first = protocol.first_sentences if protocol else None
        scenes = {"options": SourceOptions(arguments.root, first_sentences=first)}
    short = [source.rpartition("/")[2] or source for source in sources]
    # Files of one name in several folders keep their paths.
    names = [n if short.count(n) == 1 else s for s, n in zip(sources, short, strict=True)]
    opened = []
    for source, name in zip(sources, names, strict=True):
        examples = open_examples(source, arguments.num_examples, **scenes)
        counted = protocol or default_protocol(examples.examples)
        task = EvaluationTask(name, examples.examples, examples.max_targets, counted)
        opened.append(_OpenedDataset(examples, task))
    return opened


@contextmanager
def _kept_rows(files: Sequence[RowFile], out: Path | None) -> Iterator[None]:
    """Keep the rows that are finished when the block is interrupted or fails, and say so."""
    try:
        with ExitStack() as stack:
            for file in files:
                if not file.is_complete:
                    stack.enter_context(file.appending())
            yield
    except BaseException:
        if out is not None:
            done, count = sum(len(file.rows) for file in files), sum(map(len, files))
            log(
                f"{done:,} of {count:,} examples are finished and kept in {out}; run the same "
                "command again to continue"
            )
        raise


def _evaluate(job: EvaluationJob, files: Sequence[RowFile], num_workers: int) -> dict[str, Any]:
    """Evaluate the examples that have no row, append their rows, and return the speed."""
    pending = [(i, job.tasks[i].image_groups(file.rows)) for i, file in enumerate(files)]
    shares = make_shares(pending, num_workers)
    num_images = sum(len(groups) for _, groups in pending)
    count, kept = sum(map(len, files)), sum(len(file.rows) for file in files)
    failed = sum(row.error is not None for file in files for row in file.rows.values())
    done, start = kept, time.perf_counter()
    runtimes: list[str] = []
    with StepPrinter() as steps:

        def on_ready(description: str) -> None:
            nonlocal start
            if not runtimes:
                start = time.perf_counter()
                steps("evaluate")
            runtimes.append(description)

        if kept:
            steps.note(f"{kept:,} of {count:,} examples have been evaluated before")
        with closing(job.run_shares(shares, on_ready)) as rows:
            for number, row in rows:
                files[number].append(row)
                done, failed = done + 1, failed + (row.error is not None)
                steps.progress(f"{done:,} of {count:,} examples, {failed:,} failed")
    seconds = time.perf_counter() - start
    return {
        "num_instructions": done - kept,
        "num_images": num_images,
        "num_workers": len(shares),
        "seconds": seconds,
        "images_per_second": num_images / seconds,
        "instructions_per_second": (done - kept) / seconds,
        "runtimes": runtimes,
    }


def _finish(
    store: EvaluationStore, datasets: Sequence[_OpenedDataset], files: Sequence[RowFile]
) -> list[EvaluatedDataset]:
    """Write rows and metrics of all data sets."""
    evaluated = []
    for opened, file in zip(datasets, files, strict=True):
        rows, task = file.finish(), opened.task
        summary = summarize_dataset(rows, task.protocol)
        description, folder = opened.examples.description, store.folders[task.name]
        evaluated.append(EvaluatedDataset(task, description, folder, rows, summary))
    names = [opened.task.name for opened in datasets]
    store.finish({name: each.summary for name, each in zip(names, evaluated, strict=True)})
    return evaluated


def _report(
    arguments: argparse.Namespace,
    job: EvaluationJob,
    identity: Mapping[str, Any],
    evaluated: Sequence[EvaluatedDataset],
    *,
    judge: JudgeSettings | None,
    speed: Mapping[str, Any],
) -> JudgeReport | None:
    """Write the report if there is a directory for it; the model is opened if a prior is missing.

    A run that found all rows done leaves the speed of the one before it.
    """
    if not arguments.out:
        return None
    path = arguments.out / SPEED_FILE
    if speed["num_instructions"] or not path.is_file():
        write_json(path, speed)
    measured = json.loads(path.read_text(encoding="utf-8"))
    with StepPrinter() as steps, ExitStack() as stack:

        @cache
        def segment() -> Segment:
            return stack.enter_context(job.open()).segment

        options = ReportOptions(
            segment=segment,
            judge=judge,
            training_run=arguments.training_run,
            head=_head(arguments, identity),
            foot=f"Speed of the last run that computed rows: {measured['images_per_second']:.3g} "
            f"images/s, {measured['instructions_per_second']:.3g} instructions/s over "
            f"{measured['num_instructions']:,} rows; {'; '.join(measured['runtimes'])}.",
            on_step=steps,
            on_progress=steps.progress,
        )
        return write_report(arguments.out, "Evaluation", evaluated, options)


def _head(arguments: argparse.Namespace, identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name bundle, version, data sets and options."""
    name = Path(arguments.bundle).resolve().name if arguments.bundle else "demo model"
    options = {key: value for key, value in identity["options"].items() if value is not None}
    if options.get("policy") != "vllm":
        options.pop("vllm", None)
    return [
        ("bundle", f"{name}, {identity['bundle'][:12]}"),
        ("coprs-deploy", identity["library_version"]),
        *((f"data set {d['name']}", d["fingerprint"][:12]) for d in identity["datasets"]),
        ("options", ", ".join(f"{key} {value}" for key, value in options.items())),
    ]


def _print(
    arguments: argparse.Namespace,
    datasets: Sequence[_OpenedDataset],
    evaluated: Sequence[EvaluatedDataset],
    thresholds: Mapping[str, float],
    speed: Mapping[str, Any],
) -> int:
    """Print metrics, speed and missed thresholds; return the exit code."""
    shown, tables, failed = {}, [], []
    for opened, each in zip(datasets, evaluated, strict=True):
        name, summary = opened.task.name, each.summary
        metrics = flat_summary(summary)
        missed = failed_thresholds(metrics, thresholds)
        failed += [f"{name}: {line}" for line in missed] if len(datasets) > 1 else missed
        head = f"{each.description}, protocol {summary.protocol}"
        by_type = [
            (k, f"{v:.4f}", "")
            for k, v in metrics.items()
            if k not in summary.metrics and k.rpartition(".")[2] in PRINTED_BY_TYPE
        ]
        rows = [*metric_rows(summary.metrics), *by_type]
        if summary.num_failed:
            rows.append(("failed rows, IoU 0 each", f"{summary.num_failed:,}", ""))
        tables.append(table((head, "", "95 % interval"), rows))
        shown[name] = {**summary.to_json(), "source": opened.examples.to_json()}
    rate = f"{speed['images_per_second']:.3g} images/s"
    if speed["num_instructions"]:
        tables.append(f"{rate}, {speed['instructions_per_second']:.3g} instructions/s")
    report = {"datasets": shown, "failed_thresholds": failed, "speed": speed}
    print_result(arguments, report, "\n\n".join(tables))
    for line in failed:
        log(line)
    return 1 if failed else 0
