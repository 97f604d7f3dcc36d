"""Argument parsers that are built when their verb is chosen, and suggest the nearest name."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from coprs_deploy.errors import error_body

_INVALID_CHOICE = re.compile(r"invalid choice: '([^']+)' \(choose from (.+)\)")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)")


class SuggestingParser(argparse.ArgumentParser):
    """``ArgumentParser`` whose errors suggest the nearest name, and are JSON with ``--json``.

    ``fill`` adds the arguments, once, when the parser is first used.
    """

    def __init__(
        self, fill: Callable[[argparse.ArgumentParser], None] | None = None, **options: Any
    ) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)
        self._as_json = False
        self._fill = fill

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Add the arguments of this parser if they are still missing, then parse."""
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self)
        given = list(sys.argv[1:] if args is None else args)
        self._as_json = "--json" in given
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion and exit with 2."""
        wrong, known = "", list[str]()
        if choice := _INVALID_CHOICE.search(message):
            wrong, known = choice[1], re.findall(r"[\w.-]+", choice[2])
        elif unknown := _UNRECOGNIZED.search(message):
            wrong = unknown[1].split("=")[0]
            known = sorted(self._flags())
        nearest = difflib.get_close_matches(wrong, known, n=1)
        text = f"{message}; did you mean {nearest[0]}?" if nearest else message
        if self._as_json:
            print_json(error_body(argparse.ArgumentError(None, text)))
        self.exit(2, f"{self.prog}: {text}\nTry `{self.prog} --help`.\n")

    def _flags(self) -> set[str]:
        """Collect the options of this parser and of the chosen verb."""
        flags = {flag for action in self._actions for flag in action.option_strings}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags.update(*(verb._flags() for verb in action.choices.values()))
        return flags


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, in ASCII if its encoding lacks a character."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # also bytes of a path that are not UTF-8
        text = json.dumps(data)
    print(text)


def print_result(arguments: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    """Print the result of a verb on stdout: one JSON object with ``--json``, else the text."""
    if arguments.json:
        print_json(data)
    else:
        print(text)


def log(text: str) -> None:
    """Write a line for people on stderr."""
    print(text, file=sys.stderr, flush=True)
