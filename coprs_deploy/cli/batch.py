"""Segment many images: a folder, a table or WebDataset shards to Parquet part files.

SRC is a folder or pattern of images, or JSON lines (.jsonl), CSV, Parquet or WebDataset shards
(.tar) with an image and an instruction a row; paths in a table are relative to it. A URL works if
fsspec and the package of its protocol are installed. A row that fails is a row with its error.

A run that ended early goes on with --resume; --retry-failed also repeats rows that failed. Exit
code 1 if a row failed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from coprs_deploy import demo
from coprs_deploy.artifacts import check_writable
from coprs_deploy.batch.annotations import LOCAL_FILES, write_fiftyone, write_label_studio
from coprs_deploy.batch.coco import write_coco
from coprs_deploy.batch.local import BatchSummary, run_rows
from coprs_deploy.batch.manifest import BatchManifest, BatchOutput
from coprs_deploy.batch.ray_workers import RayWorkers
from coprs_deploy.batch.segment_batch import bundle_fingerprint
from coprs_deploy.batch.sources import RowSource, SourceColumns
from coprs_deploy.batch.workers import BatchWorkers, Workers, WorkerSettings, default_num_workers
from coprs_deploy.bundle import open_bundle
from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.cli.runtime_arguments import GRAPHS, POLICY
from coprs_deploy.console import StepPrinter, table
from coprs_deploy.errors import check_number
from coprs_deploy.runtime import RuntimeOptions
from coprs_deploy.runtime.ray_cluster import import_ray, read_ray_options

OPTIONS = GRAPHS + POLICY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("source", metavar="SRC", help="folder, pattern, table, shard or URL")
    parser.add_argument(
        "--bundle",
        type=Path,
        help="bundle directory, or hf://org/name (default: the demo model)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder or URL of the part files"
    )
    parser.add_argument(
        "--instruction",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to segment in every image; may be repeated",
    )
    parser.add_argument(
        "--instruction-column",
        default="",
        metavar="C",
        help="column with an instruction, or a list of them (default: instruction)",
    )
    parser.add_argument(
        "--image-column",
        metavar="C",
        help="column with the path, URL or bytes of the image (default: image_path, else image)",
    )
    parser.add_argument(
        "--max-targets", type=int, default=1, help="maximum number of targets (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="token budget of each response (default: the checkpoint's)",
    )
    parser.add_argument(
        "--rows-per-file",
        type=int,
        default=1000,
        metavar="N",
        help="rows of a part file, the smallest unit that is kept (default: 1000)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes (default: the number of cores for a small bundle, else 1)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where the rows are segmented: on this machine, or by actors of a Ray cluster",
    )
    parser.add_argument(
        "--replicas",
        metavar="MIN:MAX",
        help="ray: number of actors, of which each has a GPU, or --num-threads cores (default: 1)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="ray: address of the cluster (default: RAY_ADDRESS, else one on this machine)",
    )
    parser.add_argument("--save-masks", action="store_true", help="write a PNG of each mask")
    parser.add_argument("--coco", type=Path, metavar="FILE", help="also write COCO results")
    parser.add_argument(
        "--fiftyone", type=Path, metavar="DIR", help="also write a dataset for FiftyOne"
    )
    parser.add_argument(
        "--label-studio",
        type=Path,
        metavar="FILE.json",
        help="also write tasks with predictions for Label Studio, and FILE.xml with its setup",
    )
    parser.add_argument(
        "--image-root",
        metavar="PREFIX",
        help="folder or URL before the names of the images in these two (default: the folder of "
        f"SRC; for Label Studio {LOCAL_FILES})",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that ended early")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="go on with a run, and repeat the rows that failed",
    )
    add_options(parser, RuntimeOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Run the batch, write the COCO results, print the summary."""
    check_number("max_targets", arguments.max_targets, least=1)
    check_number("rows_per_file", arguments.rows_per_file, least=1)
    if arguments.max_new_tokens is not None:
        check_number("max_new_tokens", arguments.max_new_tokens, least=1)
    if arguments.workers is not None:
        check_number("workers", arguments.workers, least=1)
    for file in (arguments.coco, arguments.label_studio):
        if file:
            check_writable(file, is_file=True)
    if arguments.fiftyone:
        check_writable(arguments.fiftyone)
    runtime = read_options(arguments, RuntimeOptions, OPTIONS)
    columns = SourceColumns(
        tuple(arguments.instruction), arguments.instruction_column, arguments.image_column
    )
    bundle = open_bundle(arguments.bundle or demo.BUNDLE)
    if arguments.bundle:
        arguments.bundle = bundle.path  # one download for all workers
    open_workers = _worker_opener(arguments, default_num_workers(bundle, runtime))
    with StepPrinter() as steps:
        steps("list the rows")
        source = RowSource(arguments.source, columns)
        output = BatchOutput(arguments.out, _manifest(arguments, source, columns))
        with output.opened(resume=arguments.resume or arguments.retry_failed):
            steps(f"segment {source.num_rows:,} rows")
            settings = WorkerSettings(
                arguments.bundle,
                runtime,
                arguments.max_targets,
                arguments.max_new_tokens,
                output.mask_folder if arguments.save_masks else None,
            )
            summary = run_rows(
                source,
                output,
                partial(open_workers, settings),
                retry_failed=arguments.retry_failed,
                on_progress=_Progress(steps),
            )
            _write_exports(arguments, source, output, steps)
    _print_summary(arguments, source, summary)
    return 1 if summary.num_failed else 0


def _write_exports(
    arguments: argparse.Namespace, source: RowSource, output: BatchOutput, steps: StepPrinter
) -> None:
    """Write the rows in the formats of other tools."""
    if arguments.coco:
        steps(f"write {arguments.coco.name}")
        write_coco(arguments.coco, output.rows())
    if arguments.fiftyone:
        steps(f"write {arguments.fiftyone.name}")
        root = arguments.image_root
        if root is None:
            first = next(iter(source))
            root = first.location.removesuffix(first.image)
        write_fiftyone(arguments.fiftyone, output.rows(), root)
    if arguments.label_studio:
        steps(f"write {arguments.label_studio.name}")
        write_label_studio(
            arguments.label_studio,
            output.rows(),
            LOCAL_FILES if arguments.image_root is None else arguments.image_root,
        )


def _worker_opener(
    arguments: argparse.Namespace, num_workers: int
) -> Callable[[WorkerSettings], BatchWorkers]:
    """Return what opens the workers of the chosen engine, after a check of its options."""
    if arguments.engine == "local":
        for name in ("replicas", "ray_address"):
            if getattr(arguments, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is given; accepted: with --engine ray only")
        return lambda settings: Workers(settings, arguments.workers or num_workers)
    if arguments.workers is not None:
        raise ValueError("--workers is given; accepted: with --engine local only; see --replicas")
    options = read_ray_options(arguments.replicas, arguments.ray_address)
    import_ray()  # what is missing is found before the work
    return lambda settings: RayWorkers(settings, options)


def _manifest(
    arguments: argparse.Namespace, source: RowSource, columns: SourceColumns
) -> BatchManifest:
    """Return what is run; where it runs may differ when it is resumed."""
    chosen = asdict(columns)
    options = {
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in chosen.items()
        },
        "max_targets": arguments.max_targets,
        "max_new_tokens": arguments.max_new_tokens,
        "save_masks": arguments.save_masks,
    }
    return BatchManifest(
        bundle=bundle_fingerprint(arguments.bundle),
        source=source.fingerprint,
        options=options,
        num_rows=source.num_rows,
        rows_per_file=arguments.rows_per_file,
    )


class _Progress:
    """Shows the number of rows, their rate, and the time that is left."""

    def __init__(self, steps: StepPrinter) -> None:
        self._steps = steps
        self._start: float | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._start is None:  # the first task also waits for the workers
            self._start, self._first = now, done
        rate = (done - self._first) / max(now - self._start, 1e-6)
        left = f", {rate:.1f} rows/s, {_duration((total - done) / rate)} left" if rate else ""
        self._steps.progress(f"{done:,} of {total:,}{left}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _print_summary(arguments: argparse.Namespace, source: RowSource, summary: BatchSummary) -> None:
    for kind, (count, first) in summary.errors.items():
        log(f"{count:,} rows failed with {kind}; {first}")
    rows = [
        ("rows", f"{summary.num_rows:,}"),
        ("segmented now", f"{summary.num_done:,}"),
        ("kept from earlier runs", f"{summary.num_kept:,}"),
        ("failed", f"{summary.num_failed:,}"),
        ("rows per second", f"{summary.rows_per_second:.1f}"),
    ]
    report = {
        "out": arguments.out,
        **asdict(summary),
        "rows_per_second": summary.rows_per_second,
        "errors": {kind: count for kind, (count, _) in summary.errors.items()},
    }
    print_result(arguments, report, f"{source.description}\n{table(rows[0], rows[1:])}")
