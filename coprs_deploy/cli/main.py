"""``coprs-deploy``: parse the arguments, run the verb, turn errors into exit codes."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import select
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from coprs_deploy.cli.parser import SuggestingParser, print_json
from coprs_deploy.errors import CoPRSError, error_body, import_failure, install_hint
from coprs_deploy.version import __version__

VERBS = {
    "segment": "segment what an instruction describes in an image",
    "batch": "segment many images: folders, tables and shards",
    "serve": "serve segmentation over HTTP, with a web page",
    "convert": "convert SAM, policy or public training weights to a checkpoint",
    "quantize": "quantize the policy of a checkpoint for vLLM",
    "export": "export a checkpoint to a bundle of graphs",
    "verify": "compare a bundle with its checkpoint",
    "push": "upload a bundle to the Hugging Face hub",
    "inspect": "show the contents of a bundle",
    "doctor": "report which runtimes and policies can run on this machine",
    "train": "train a model by a recipe",
    "features": "precompute SAM's image embeddings for training",
    "evaluate": "evaluate a bundle on held-out scenes or your own examples",
    "bench": "measure speed, memory and accuracy",
    "data": "inspect, check and convert data sets",
    "synth": "generate synthetic scenes: a contact sheet, or a file of examples",
}
"""Summary of each verb; its module is imported when it is chosen."""

EXTRAS = {
    "convert": "torch",
    "export": "export",
    "verify": "export",
    "train": "train",
    "features": "train",
}
"""Extra of the verbs that the runtime's packages do not suffice for."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT."""

READER_GONE = 141
"""Exit code of a program whose reader closed the pipe: 128 and the number of SIGPIPE."""

OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc|bad allocation", re.IGNORECASE)
"""Text of the errors of PyTorch and the runtimes that report a failed allocation."""

DESCRIPTION = """Reasoning segmentation with CoPRS: convert public weights, export verified graphs
and engines, and serve masks with reasoning."""

EPILOG = """examples:
  coprs-deploy segment examples/scene.png "the largest red circle" --out result
  coprs-deploy convert --policy DIR --sam sam_vit_h.pth --out checkpoint
  coprs-deploy export checkpoint --out bundle
  coprs-deploy segment photo.jpg "the cup that is about to fall" --bundle bundle --out result

exit codes: 0 done, 1 a check failed or nothing was found, 2 wrong use, 130 interrupted"""


def build_parser() -> argparse.ArgumentParser:
    """Assemble the parser; the options of a verb are added when that verb is chosen."""
    parser = SuggestingParser(prog="coprs-deploy", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"coprs-deploy {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verbs.add_parser(name, help=summary, fill=partial(_add_arguments, name))
    return parser


def _add_arguments(verb: str, parser: argparse.ArgumentParser) -> None:
    module = importlib.import_module(f"coprs_deploy.cli.{verb}")
    parser.description = module.__doc__
    parser.set_defaults(run=module.run)
    module.add_arguments(parser)
    if verb != "serve":  # it runs until it is stopped and has no result
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout, errors included"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for name in ("stdout", "stderr"):  # None if the caller closed it, as ``>&-`` does
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr, for paths that are not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        parsed = build_parser().parse_args(arguments)
    except SystemExit as stop:  # --help, --version, or wrong use
        return int(stop.code or 0)
    except KeyboardInterrupt:  # while the modules of the verb are imported
        return INTERRUPTED
    try:
        with _exit_on_signals():
            code: int = parsed.run(parsed)
        sys.stdout.flush()
    except CoPRSError as error:
        return _report(parsed, error, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if parsed.verb not in EXTRAS:
            raise
        missing = import_failure(
            error, "", install_hint(EXTRAS[parsed.verb]), needed_by=parsed.verb
        )
        return _report(parsed, missing, str(missing), missing.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return READER_GONE
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _report(parsed, error, reason, 2)
    except ValueError as error:
        return _report(parsed, error, str(error), 2)
    except KeyboardInterrupt as error:
        return _report(parsed, error, "interrupted", INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).splitlines()[0] if str(error) else "the system refused an allocation"
        return _report(parsed, error, f"out of memory: {reason}", 2)
    return code


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a verb as Ctrl-C does: what is unfinished is removed.

    A library in which a signal arrives may raise an error of its own instead of the exception of
    the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, frame: object = None) -> NoReturn:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in signals}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        yield
    except Exception:
        if received:
            stop(received[0])
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(parsed: argparse.Namespace, error: BaseException, message: str, exit_code: int) -> int:
    """Print an error on stderr, and with ``--json`` as JSON on stdout; return the exit code."""
    with _flushed_or_discarded(sys.stderr):
        print(f"coprs-deploy {parsed.verb}: {message}", file=sys.stderr)
    with _flushed_or_discarded(sys.stdout):
        if parsed.verb != "serve" and parsed.json:
            print_json(error_body(error, message))
    return exit_code


@contextmanager
def _flushed_or_discarded(stream: TextIO) -> Iterator[None]:
    """Flush a stream after a block; if its disk is full, discard what is still to be written."""
    try:
        yield
        stream.flush()
    except OSError:
        _discard(stream)


def _reader_is_gone() -> bool:
    """Whether the broken pipe is that of stdout, whose reader has read enough, as ``head`` does."""
    try:
        stdout = sys.stdout.fileno()
    except io.UnsupportedOperation:
        return False  # not a file, hence not a pipe
    poll = select.poll()
    poll.register(stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    _discard(sys.stdout)
    return True


def _discard(stream: TextIO) -> None:
    """Discard what is still to be written, because Python tries once more at exit."""
    with suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
