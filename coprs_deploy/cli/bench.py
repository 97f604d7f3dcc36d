"""Measure a bundle on this machine, beside what people would use instead, and write a report.

  engines     each graph with each runtime and precision, beside PyTorch and segment-anything
  answer      whole answers by stage
  policy      the policy alone
  start       import, load, first mask
  scaling     targets, questions and pictures at once, size of a picture
  export      exports and engine builds: time, peak memory, size
  precision   accuracy of fp16 and bf16 with every rounding written out, no time
  full-size-export   conversion and export of ViT-B and ViT-H, its own report (needs --out)

Without --suite: a quick look at engines, answer and start, within three minutes for the shipped
model; `--suite engines,answer,start` also takes lower precisions on a CPU, the small graphs alone,
and more repetitions. With --full, engines, scaling and export measure SAM's
real sizes with random weights. A row that fails is a row with its reason.

  coprs-deploy bench --out reports                          the shipped model
  coprs-deploy bench BUNDLE --checkpoint CHECKPOINT         yours
  coprs-deploy bench --compare old.json new.json            what got slower, beyond the noise

Exit code 1 when a comparison finds a regression, or a limit that a suite states is not kept.
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
    from coprs_deploy.benchmarks.run import Request

SUMMARY = "measure, and write a report"

FULL_SIZE_EXPORT = "full-size-export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, nargs="?", help="default: the shipped model"
    )
    parser.add_argument("--suite", metavar="NAME,NAME", help="which suites; `all` takes every one")
    parser.add_argument(
        "--checkpoint", type=Path, help="of the bundle: PyTorch's rows and other precisions need it"
    )
    parser.add_argument("--full", action="store_true", help="SAM's real sizes, random weights")
    parser.add_argument("--sizes", help="which sizes with --full (default vit_b,vit_l,vit_h)")
    parser.add_argument(
        "--device", help="cpu, cuda, or both with a comma (default: every one that is here)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="pictures for int8 (shipped model: drawn)"
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="rows whose group and name hold this"
    )
    parser.add_argument(
        "--seconds", type=float, help="measured time of a row (default 1, with --full 12)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each row (default 3)")
    parser.add_argument(
        "--limit", type=float, help="seconds after which a run is given up (default 30, full 120)"
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="for rows side by side (default: half of it)"
    )
    parser.add_argument("--theme", help="a word for the names of the files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for JSON, page and charts")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder of what is prepared, used again next time"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="export what will be measured into --work, and stop"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"))
    parser.add_argument(
        "--tolerance", type=float, help="with --compare: what may be slower (default 0.05)"
    )
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, or compare."""
    if arguments.compare:
        return _compare(arguments)
    if arguments.suite == FULL_SIZE_EXPORT:
        return _full_size_export(arguments)
    from coprs_deploy.benchmarks.outputs import write_outputs
    from coprs_deploy.benchmarks.run import run_benchmark
    from coprs_deploy.benchmarks.text import render_text

    if arguments.prepare and arguments.work is None:
        raise ValueError("--prepare keeps what it makes: name a folder with --work")
    request = _request(arguments)
    with StepPrinter() as progress:
        report = run_benchmark(request, progress)
    if arguments.prepare:
        log(f"prepared in {arguments.work}: measure with the same command without --prepare")
        return 0
    if arguments.out:
        written, left_out = write_outputs(arguments.out, report)
        log(f"wrote {', '.join(map(str, written))}")
        if left_out:
            log(left_out)
    if arguments.json:
        print_json(report.to_json())
    else:
        print(render_text(report))
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    from coprs_deploy.benchmarks.measurement import Settings, memory_for_rows
    from coprs_deploy.benchmarks.run import Request, devices_here
    from coprs_deploy.benchmarks.suites import DEFAULT_SUITES, SUITES
    from coprs_deploy.benchmarks.workshop import model_from_bundle, shipped_model
    from coprs_deploy.engines import RunnerOptions
    from coprs_deploy.model_config import SAM_SIZES

    is_quick = not arguments.suite and not arguments.full
    suites = DEFAULT_SUITES if not arguments.suite else tuple(arguments.suite.split(","))
    if arguments.suite == "all":
        suites = tuple(SUITES)
    sizes = tuple((arguments.sizes or "vit_b,vit_l,vit_h").split(",")) if arguments.full else ()
    if arguments.sizes and not arguments.full:
        raise ValueError("--sizes goes with --full only")
    for size in sizes:
        if size not in SAM_SIZES:
            raise ValueError(f"sizes names {size!r}; accepted: {', '.join(SAM_SIZES)}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; it must be at least 1")
    if arguments.checkpoint and not arguments.bundle:
        raise ValueError("--checkpoint goes with BUNDLE; the shipped model brings its own")
    model = (
        model_from_bundle(arguments.bundle, arguments.checkpoint)
        if arguments.bundle
        else shipped_model()
    )
    devices = tuple(arguments.device.split(",")) if arguments.device else devices_here()
    for device in devices:
        RunnerOptions(device=device)  # refuses what is no device
    memory = arguments.memory * 2**30 if arguments.memory else memory_for_rows()
    return Request(
        model=model,
        suites=suites,
        sizes=sizes,
        devices=devices,
        only=arguments.only,
        calibration=arguments.calibration,
        is_quick=is_quick,
        theme=arguments.theme or ("full-size" if arguments.full else model.name),
        command=_command(),
        settings=Settings(
            seconds=arguments.seconds or (12.0 if arguments.full else 1.0),
            rounds=arguments.rounds,
            most_rounds=arguments.rounds + (0 if is_quick else 2),
            warm_up_seconds=0.5,
            limit_seconds=arguments.limit or (120.0 if arguments.full else 30.0),
            memory_bytes=int(memory),
        ),
        work=arguments.work,
        prepare_only=arguments.prepare,
    )


def _command() -> str:
    """Give the command as it was typed, without folders of this machine."""
    words = sys.argv[1:] if sys.argv[1:2] == ["bench"] else ["bench"]
    kept, skip = ["coprs-deploy"], False
    for word in words:
        if skip or word.partition("=")[0] in ("--work", "--out"):
            skip = not skip and "=" not in word
            continue
        kept.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(kept)


def _compare(arguments: argparse.Namespace) -> int:
    from coprs_deploy.benchmarks.comparison import (
        Tolerances,
        Verdict,
        compare_reports,
        machine_differences,
    )
    from coprs_deploy.benchmarks.report import read_report

    old, new = (read_report(path) for path in arguments.compare)
    given = {} if arguments.tolerance is None else {"time": arguments.tolerance}
    findings = compare_reports(old, new, Tolerances(**given))
    differences = machine_differences(old, new)
    regressions = [finding for finding in findings if finding.is_regression]
    if arguments.json:
        shown = [
            {"place": f.place, "verdict": f.verdict.value, "detail": f.detail} for f in findings
        ]
        print_json(
            {"findings": shown, "regressions": len(regressions), "machine": list(differences)}
        )
    else:
        for line in differences:
            print(f"the machine differs: {line}")
        for finding in findings:
            if finding.verdict is not Verdict.SAME or finding.detail:
                print(f"{finding.verdict.value:<12} {finding.place}: {finding.detail}")
        print(f"{len(findings)} findings, {len(regressions)} regressions")
    return 1 if regressions else 0


def _full_size_export(arguments: argparse.Namespace) -> int:
    from coprs_deploy.benchmarks import full_size_export
    from coprs_deploy.model_config import SAM_SIZES

    if arguments.out is None:
        raise ValueError(f"--suite {FULL_SIZE_EXPORT} writes its report into --out DIR")
    sizes = (arguments.sizes or "vit_b,vit_h").split(",")
    unknown = [size for size in sizes if size not in SAM_SIZES]
    if unknown:
        raise ValueError(f"sizes names {unknown[0]!r}; accepted: {', '.join(SAM_SIZES)}")
    with StepPrinter() as progress:
        report = full_size_export.run(arguments.out, sizes, progress)
    if arguments.json:
        print_json(report)
    else:
        print(full_size_export.render(report))
    failures = full_size_export.failures(report)
    for failure in failures:
        log(failure)
    return 1 if failures else 0
