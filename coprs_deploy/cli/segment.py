"""Answer one instruction on one picture.

The reasoning is printed as it is written. With --out, overlay, mask, prior and result.json are left
in a folder. Exit code 1 means that the policy named no target: there is no mask then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coprs_deploy.cli.parser import add_json_flag, log, print_json
from coprs_deploy.cli.runtime_arguments import add_answering_arguments, runtime_options

SUMMARY = "answer an instruction on a picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of this verb."""
    parser.add_argument("image", metavar="IMAGE", help="a picture file, or - for stdin")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to segment, in words")
    parser.add_argument(
        "--bundle", type=Path, help="the bundle that answers (default: the shipped model)"
    )
    parser.add_argument("--out", type=Path, help="folder for overlay, mask, prior and result.json")
    parser.add_argument(
        "--targets", type=int, default=1, help="objects to name at most (default 1)"
    )
    parser.add_argument("--max-new-tokens", type=int, help="token budget of the response")
    add_answering_arguments(parser)
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer, print, save."""
    from coprs_deploy.runtime import CoPRS, SegmentationResult, TextDelta
    from coprs_deploy.runtime.loading import no_progress

    options = runtime_options(arguments)
    image = sys.stdin.buffer.read() if arguments.image == "-" else arguments.image
    report = log if arguments.policy == "vllm" else no_progress  # its engine takes a while
    with CoPRS.load(arguments.bundle, options, progress=report) as coprs:
        for choice in coprs.choices:
            log(str(choice))
        answer: SegmentationResult | None = None
        for event in coprs.stream(
            image, arguments.instruction, arguments.targets, arguments.max_new_tokens
        ):
            if isinstance(event, SegmentationResult):
                answer = event
            elif isinstance(event, TextDelta) and not arguments.json:
                print(event.text, end="", flush=True)
    assert answer is not None
    written = answer.save(arguments.out) if arguments.out else {}
    if arguments.json:
        files = {name: str(path) for name, path in written.items()}
        print_json({**answer.to_json(), "files": files})
    else:
        print()
        log(repr(answer))
        for path in written.values():
            log(f"  {path}")
    return 0 if answer.found else 1
