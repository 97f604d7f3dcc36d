"""``coprs-deploy``: parse the arguments, run the verb, turn errors into exit codes.

Exit codes: 0 done, 1 a check failed (or nothing was found), 2 wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence

from coprs_deploy.cli.parser import SuggestingParser
from coprs_deploy.errors import CoPRSError
from coprs_deploy.version import __version__

VERBS = (
    "segment",
    "serve",
    "export",
    "verify",
    "inspect",
    "convert",
    "train",
    "features",
    "synth",
    "evaluate",
    "bench",
    "doctor",
)

READER_GONE = 141
"""Exit code of a program whose reader closed the pipe: 128 and the number of SIGPIPE."""

DESCRIPTION = """Reasoning segmentation with CoPRS, deployed: a picture and an instruction become
reasoning, a heatmap and a mask, through exported graphs."""

EPILOG = """examples:
  coprs-deploy segment examples/scene.png "the largest red circle" --out answer
  coprs-deploy convert --policy DIR --sam sam_vit_h.pth --out checkpoint
  coprs-deploy export checkpoint --out bundle
  coprs-deploy segment photo.jpg "the cup that is about to fall" --bundle bundle --out answer

exit codes: 0 done, 1 a check failed or nothing was found, 2 wrong use"""


def build_parser() -> argparse.ArgumentParser:
    """Assemble the parser of all verbs; no heavy library is imported."""
    parser = SuggestingParser(
        prog="coprs-deploy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"coprs-deploy {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"coprs_deploy.cli.{name}")
        verb = verbs.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        verb.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except CoPRSError as error:
        print(f"coprs-deploy {parsed.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return READER_GONE
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"coprs-deploy {parsed.verb}: {reason}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"coprs-deploy {parsed.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"coprs-deploy {parsed.verb}: interrupted", file=sys.stderr)
        return 130
    return code


def _reader_is_gone() -> bool:
    """Whether the broken pipe is that of stdout, whose reader has seen enough, as ``head`` has.

    What is left goes nowhere then, for Python would flush it once more at the exit.
    """
    try:
        stdout = sys.stdout.fileno()
    except io.UnsupportedOperation:
        return False  # no file, hence no pipe
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


if __name__ == "__main__":
    sys.exit(main())
