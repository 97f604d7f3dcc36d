"""Measure a bundle on this machine, beside PyTorch and segment-anything, and write a report.

  engines     each graph in each runtime and precision, beside PyTorch and segment-anything
  answer      whole requests, by stage
  latency     whole requests by the limit of their reasoning: accuracy against p50 and p99
  policy      the policy alone
  start       import, load, first mask
  scaling     number of targets, questions and images, size of the image
  export      exports and engine builds, with --sizes conversions too: time, peak memory, size
  precision   accuracy of fp16 and bf16 with every rounding explicit, no time

Without --suite: a quick look at engines, answer and start, within three minutes for the demo model;
`--suite engines,answer,start` adds lower precisions on a CPU, the small graphs alone, and more
repetitions. With --sizes, engines, scaling and export measure SAM's real sizes with random weights.
Failed cases are reported with their error instead of aborting the run.

  coprs-deploy bench --out reports                          the demo model
  coprs-deploy bench BUNDLE --checkpoint CHECKPOINT         your own bundle
  coprs-deploy bench --compare old.json new.json            regressions beyond the noise
  coprs-deploy bench --render report.json --out reports     Markdown and page of a report

Exit code 1 when a comparison finds a regression, or a case exceeds a limit of its suite.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from coprs_deploy.artifacts import check_writable
from coprs_deploy.bench.case import BenchOptions
from coprs_deploy.bench.comparison import (
    REGRESSIONS,
    TIME_TOLERANCE,
    compare_reports,
    machine_differences,
)
from coprs_deploy.bench.fixtures import gpu_name
from coprs_deploy.bench.graph_suites import limit_violations
from coprs_deploy.bench.render import render_text, write_outputs
from coprs_deploy.bench.report import read_report
from coprs_deploy.bench.run import SUITES, run_benchmark
from coprs_deploy.cli.options import Option, add_options, read_options
from coprs_deploy.cli.parser import log, print_result
from coprs_deploy.cli.runtime_arguments import add_bundle_argument
from coprs_deploy.console import StepPrinter
from coprs_deploy.engines import RunnerOptions
from coprs_deploy.hub import local_bundle
from coprs_deploy.machine import available_memory_bytes
from coprs_deploy.model_config import SAM_SIZES


def _names(text: str, everything: Iterable[str]) -> tuple[str, ...]:
    return tuple(everything) if text == "all" else tuple(text.split(","))


def _devices(text: str) -> tuple[str, ...]:
    return tuple(RunnerOptions(device=name).device for name in text.split(","))


def _deadlines(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


REAL_SIZES = [size for size in SAM_SIZES if size.startswith("vit_")]

OPTIONS = (
    Option(
        "suites",
        "--suite",
        parse=partial(_names, everything=SUITES),
        metavar="NAME,NAME",
        help="suites to run, or `all`",
    ),
    Option("checkpoint", parse=Path),
    Option(
        "sizes",
        parse=partial(_names, everything=REAL_SIZES),
        metavar="SIZE,SIZE",
        help="SAM sizes and light encoders with random weights: vit_b,tinyvit_5m or `all` (of SAM)",
    ),
    Option(
        "devices",
        "--device",
        parse=_devices,
        help="cpu, cuda, or both with a comma (default: all available devices)",
    ),
    Option(
        "deadlines_ms",
        "--deadline-ms",
        parse=_deadlines,
        metavar="MS,MS",
        help="deadlines of the suite latency in milliseconds",
    ),
    Option("calibration", parse=Path, metavar="DIR"),
    Option("filter", metavar="REGEX", help="run only the cases that match REGEX"),
    Option("min_time_s", help="measured time of a case (default: 1, with --sizes 12)"),
    Option("rounds", parse=int),
    Option("case_timeout_s", help="timeout of a run (default: 30, with --sizes 120)"),
    Option(
        "max_memory_bytes",
        help="memory of cases that are open side by side (default: half of the available memory)",
    ),
    Option("tag"),
    Option("work_dir", parse=Path, metavar="DIR"),
    Option("prepare_only"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    add_bundle_argument(parser)
    add_options(parser, BenchOptions, OPTIONS)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the report: JSON, Markdown, page"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"), help="compare reports"
    )
    parser.add_argument(
        "--tolerance", type=float, help="with --compare: allowed slowdown (default: 0.05)"
    )
    parser.add_argument(
        "--render", type=Path, metavar="REPORT.json", help="render a report into --out"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, compare or render."""
    if arguments.compare:
        return _compare(arguments)
    if arguments.out:
        check_writable(arguments.out)
    if arguments.render:
        report = read_report(arguments.render)
    else:
        options = _options(arguments)
        with StepPrinter() as progress:
            report = run_benchmark(options, progress, progress.note)
    if hasattr(arguments, "prepare_only"):
        log(f"prepared in {arguments.work_dir}: run the same command without --prepare-only")
        return 0
    if arguments.out:
        log(f"wrote {', '.join(map(str, write_outputs(arguments.out, report)))}")
    print_result(arguments, report.to_json(), render_text(report))
    violations = limit_violations(report)
    for violation in violations:
        log(violation)
    return 1 if violations else 0


def _options(arguments: argparse.Namespace) -> BenchOptions:
    """Build the options; some defaults depend on whether real sizes are measured."""
    has_sizes = hasattr(arguments, "sizes")
    is_quick = not has_sizes and not hasattr(arguments, "suites")
    rounds = getattr(arguments, "rounds", BenchOptions.rounds)
    return read_options(
        arguments,
        BenchOptions,
        OPTIONS,
        bundle=local_bundle(arguments.bundle) if arguments.bundle else None,
        devices=("cpu", "cuda") if gpu_name() else ("cpu",),
        is_quick=is_quick,
        tag="full-size" if has_sizes else "",
        command=_command(),
        min_time_s=12.0 if has_sizes else 1.0,
        max_rounds=rounds + (0 if is_quick else 2),
        warmup_s=0.5,
        case_timeout_s=120.0 if has_sizes else 30.0,
        max_memory_bytes=available_memory_bytes() // 2,
    )


def _command() -> str:
    """Return the command as it was typed, without folders of this machine."""
    words = sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench"]
    kept, skip = ["coprs-deploy"], False
    for word in words:
        if skip or word.partition("=")[0] in ("--work-dir", "--out"):
            skip = not skip and "=" not in word
            continue
        kept.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(kept)


def _compare(arguments: argparse.Namespace) -> int:
    old, new = (read_report(path) for path in arguments.compare)
    tolerance = TIME_TOLERANCE if arguments.tolerance is None else arguments.tolerance
    findings = compare_reports(old, new, tolerance)
    differences = machine_differences(old, new)
    regressions = [finding for finding in findings if finding.verdict in REGRESSIONS]
    shown = [finding._asdict() for finding in findings]
    lines = [f"the machine differs: {line}" for line in differences]
    for finding in findings:
        if finding.verdict != "same" or finding.detail:
            lines.append(f"{finding.verdict:<13} {finding.place}: {finding.detail}")
    lines.append(f"{len(findings)} findings, {len(regressions)} regressions")
    report = {"findings": shown, "regressions": len(regressions), "machine": differences}
    print_result(arguments, report, "\n".join(lines))
    return 1 if regressions else 0
