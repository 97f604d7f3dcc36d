"""Measure a bundle on this machine, beside PyTorch and segment-anything, and write a report.

  engines     each graph in each runtime and precision, beside PyTorch and segment-anything
  answer      whole requests, by stage
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
from pathlib import Path
from typing import TYPE_CHECKING

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.console import StepPrinter

if TYPE_CHECKING:
    from coprs_deploy.bench.case import BenchOptions
    from coprs_deploy.bench.report import Report


LIMITS = {
    "convert": {"peak_over_weights": 2.0},
    "onnxruntime": {"export_s": 180, "export_peak_over_weights": 1.5, "peak_over_weights": 3.0},
}
"""Limits of ViT-H in float32 on two cores: seconds, and peak memory in multiples of the weights. A
smaller size pays the fixed cost of the libraries (about 0.5 GB) against smaller weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, nargs="?", help="bundle (default: the demo model)"
    )
    parser.add_argument("--suite", metavar="NAME,NAME", help="suites to run, or `all`")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint of BUNDLE, for PyTorch cases and other precisions",
    )
    parser.add_argument(
        "--sizes", metavar="SIZE,SIZE", help="SAM sizes with random weights: vit_b,vit_h or `all`"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, or both with a comma (default: all available devices)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="folder of images for int8 calibration"
    )
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="run only the cases that match REGEX"
    )
    parser.add_argument(
        "--min-time",
        type=float,
        metavar="SECONDS",
        help="measured time of a case (default: 1, with --sizes 12)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument(
        "--case-timeout",
        type=float,
        metavar="SECONDS",
        help="timeout of a run (default: 30, with --sizes 120)",
    )
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GIB",
        help="memory of cases that are open side by side (default: half of the available memory)",
    )
    parser.add_argument("--tag", help="first word of the report's file names")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the report: JSON, Markdown, page"
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="folder of prepared files, kept for reuse"
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="stop when everything is prepared"
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
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, compare or render."""
    if arguments.compare:
        return _compare(arguments)
    from coprs_deploy.bench.render import render_text, write_outputs
    from coprs_deploy.bench.report import read_report
    from coprs_deploy.bench.run import run_benchmark

    if arguments.render:
        report = read_report(arguments.render)
    else:
        options = _options(arguments)
        with StepPrinter() as progress:
            report = run_benchmark(options, progress, progress.note)
    if arguments.prepare_only:
        log(f"prepared in {arguments.work_dir}: run the same command without --prepare-only")
        return 0
    if arguments.out:
        log(f"wrote {', '.join(map(str, write_outputs(arguments.out, report)))}")
    if arguments.json:
        print_json(report.to_json())
    else:
        print(render_text(report))
    violations = limit_violations(report)
    for violation in violations:
        log(violation)
    return 1 if violations else 0


def _options(arguments: argparse.Namespace) -> BenchOptions:
    from coprs_deploy.bench.case import BenchOptions
    from coprs_deploy.bench.fixtures import gpu_name
    from coprs_deploy.bench.run import SUITES
    from coprs_deploy.engines import RunnerOptions
    from coprs_deploy.machine import available_memory_bytes
    from coprs_deploy.model_config import SAM_SIZES

    def names(text: str | None, everything: tuple[str, ...]) -> tuple[str, ...]:
        return everything if text == "all" else tuple(text.split(",")) if text else ()

    real_sizes = tuple(size for size in SAM_SIZES if size.startswith("vit_"))
    sizes = names(arguments.sizes, real_sizes)
    is_quick = not arguments.suite and not sizes
    devices = names(arguments.device, ()) or (("cpu", "cuda") if gpu_name() else ("cpu",))
    for device in devices:
        RunnerOptions(device=device)  # refuses what is no device
    memory = arguments.max_memory * 2**30 if arguments.max_memory else available_memory_bytes() / 2
    return BenchOptions(
        bundle=arguments.bundle,
        checkpoint=arguments.checkpoint,
        suites=names(arguments.suite, tuple(SUITES)),
        sizes=sizes,
        devices=devices,
        filter=arguments.filter,
        calibration=arguments.calibration,
        is_quick=is_quick,
        tag=arguments.tag or ("full-size" if sizes else ""),
        command=_command(),
        min_time_s=arguments.min_time or (12.0 if sizes else 1.0),
        rounds=arguments.rounds,
        max_rounds=arguments.rounds + (0 if is_quick else 2),
        warmup_s=0.5,
        case_timeout_s=arguments.case_timeout or (120.0 if sizes else 30.0),
        max_memory_bytes=int(memory),
        work_dir=arguments.work_dir,
        prepare_only=arguments.prepare_only,
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
    from coprs_deploy.bench.comparison import (
        REGRESSIONS,
        TIME_TOLERANCE,
        compare_reports,
        machine_differences,
    )
    from coprs_deploy.bench.report import read_report

    old, new = (read_report(path) for path in arguments.compare)
    tolerance = TIME_TOLERANCE if arguments.tolerance is None else arguments.tolerance
    findings = compare_reports(old, new, tolerance)
    differences = machine_differences(old, new)
    regressions = [finding for finding in findings if finding.verdict in REGRESSIONS]
    if arguments.json:
        shown = [finding._asdict() for finding in findings]
        print_json({"findings": shown, "regressions": len(regressions), "machine": differences})
    else:
        for line in differences:
            print(f"the machine differs: {line}")
        for finding in findings:
            if finding.verdict != "same" or finding.detail:
                print(f"{finding.verdict:<13} {finding.place}: {finding.detail}")
        print(f"{len(findings)} findings, {len(regressions)} regressions")
    return 1 if regressions else 0


def limit_violations(report: Report) -> list[str]:
    """List the limits that the cases of ViT-H exceed; empty when all are kept."""
    cases = [case for group in report.groups if group.suite == "export" for case in group.cases]
    return [
        f"vit_h, {case.name}: {metric} is {case.metrics[metric]:.2f}, the limit is {limit:g}"
        for case in cases
        if case.labels["model"] == "vit_h" and case.labels.get("precision", "fp32") == "fp32"
        for metric, limit in LIMITS.get(case.labels["runtime"], {}).items()
        if case.metrics.get(metric, 0) > limit
    ]
