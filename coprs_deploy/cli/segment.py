"""Segment what an instruction describes in an image.

The response is printed as it is written. --max-reasoning-tokens, --deadline-ms and --reasoning none
bound its time: the reasoning ends early and a mask always comes. --out writes overlay, mask, prior
and result.json to a directory. Exit code 1 if the policy named no target, so that there is no mask.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from coprs_deploy.artifacts import check_writable
from coprs_deploy.cli.options import add_options, read_options
from coprs_deploy.cli.parser import log, print_json
from coprs_deploy.cli.runtime_arguments import GRAPHS, POLICY, REQUEST, open_runtime
from coprs_deploy.policy import StopReason
from coprs_deploy.prompts import FormatViolation
from coprs_deploy.runtime import RuntimeOptions, SegmentationResult, TextDelta
from coprs_deploy.runtime.options import RequestOptions

OPTIONS = GRAPHS + POLICY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("image", metavar="IMAGE", help="image file, or - for stdin")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to segment")
    parser.add_argument(
        "--bundle",
        type=Path,
        help="bundle directory, or hf://org/name (default: the demo model)",
    )
    parser.add_argument(
        "--out", type=Path, help="directory for overlay, mask, prior and result.json"
    )
    add_options(parser, RequestOptions, REQUEST)
    add_options(parser, RuntimeOptions, OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Stream one request, print the response, save the result."""
    options = read_options(arguments, RuntimeOptions, OPTIONS)
    request = read_options(arguments, RequestOptions, REQUEST)
    if arguments.out:
        check_writable(arguments.out)
    image = sys.stdin.buffer.read() if arguments.image == "-" else arguments.image
    waits = options.policy == "vllm"  # loading it takes a while
    with open_runtime(arguments.bundle, options, log if waits else lambda step: None) as coprs:
        if request.deadline_ms is not None:
            coprs.warm_up()
        result: SegmentationResult | None = None
        for event in coprs.stream(image, arguments.instruction, **asdict(request)):
            if isinstance(event, SegmentationResult):
                result = event
            elif isinstance(event, TextDelta) and not arguments.json:
                print(event.text, end="", flush=True)
    assert result is not None, "a stream ends with its result"
    written = result.save(arguments.out) if arguments.out else {}
    if arguments.json:
        files = {name: str(path) for name, path in written.items()}
        print_json({**result.to_json(), "files": files})
        return 0 if result.found else 1
    print()
    log(repr(result))
    log(result.runtime)
    if not result.found or request.is_limited:
        log(f"stop reason: {StopReason(result.stop_reason).description}")
    for violation in result.format_violations:
        log(f"format violation: {FormatViolation[violation.upper()].description}")
    for path in written.values():
        log(f"  {path}")
    return 0 if result.found else 1
