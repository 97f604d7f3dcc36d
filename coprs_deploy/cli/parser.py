"""An argument parser that answers a typo with the nearest name, and arguments that verbs share."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

_INVALID_CHOICE = re.compile(r"invalid choice: '([^']+)' \(choose from (.+)\)")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)")


class SuggestingParser(argparse.ArgumentParser):
    """``ArgumentParser`` whose errors name what was probably meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion and exit with 2."""
        wrong, known = "", list[str]()
        if choice := _INVALID_CHOICE.search(message):
            wrong, known = choice[1], re.findall(r"[\w.-]+", choice[2])
        elif unknown := _UNRECOGNIZED.search(message):
            wrong = unknown[1].split("=")[0]
            known = sorted({flag for parser in self._family() for flag in parser.flags()})
        nearest = difflib.get_close_matches(wrong, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        self.exit(2, f"{self.prog}: {message}{hint}\nTry `{self.prog} --help`.\n")

    def flags(self) -> list[str]:
        """List the options of this parser."""
        return [flag for action in self._actions for flag in action.option_strings]

    def _family(self) -> list[SuggestingParser]:
        children = [
            child
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for child in action.choices.values()
        ]
        return [self, *children]


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: one JSON object on stdout instead of text for people."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--runtime``, ``--retune`` and ``--inference-precision``."""
    parser.add_argument(
        "--runtime",
        help="of the graphs: onnxruntime, openvino, or auto, which measures once what is fastest "
        "here (default: the one that the bundle was exported for)",
    )
    parser.add_argument("--retune", action="store_true", help="with --runtime auto: measure again")
    parser.add_argument(
        "--inference-precision",
        default="fp32",
        help="of float32 products: fp32 (default), or bf16 with openvino on processors that have "
        "such units",
    )


def add_plan_code_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-engine-host-code``: engines that carry code run only where that was said."""
    parser.add_argument(
        "--allow-engine-host-code",
        action="store_true",
        help="load version-compatible engines, which carry code: only from bundles that you trust",
    )


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(data, ensure_ascii=False))


def log(text: str) -> None:
    """Write a line for people on stderr."""
    print(text, file=sys.stderr, flush=True)
