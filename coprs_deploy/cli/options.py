"""Command-line options from the fields of option records.

A record (a frozen dataclass) documents each of its settings once, in the ``Attributes:`` section of
its docstring. An :class:`Option` names a field and what differs on the command line; name, help
text and default come from the record. An option that is not given leaves the record's own default.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from coprs_deploy.docstrings import attribute_docs

R = TypeVar("R")

GIB = 2**30
_NONE = re.compile(r"; (?:None|empty) (?:selects |for )?(.*)$")


@dataclass(frozen=True)
class Option:
    """One field of a record as a command-line option.

    Attributes:
        field: name of the field.
        flag: name of the option; empty derives it from the field without its unit
            (``--num-threads``, ``--timeout``), or, for a field that is true by default, its
            negation (``--no-cuda-graphs``).
        parse: conversion of the text, which raises ``ValueError`` on a bad one; None selects that
            of the field's unit (``_s``, ``_bytes``), or the text itself.
        metavar: placeholder of the value in the help text; None derives it from unit or field.
        help: help text, where the attribute's own does not fit.
        collect: conversion of all texts of an option that may be given several times; None for an
            option that is given once.
    """

    field: str
    flag: str = ""
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    help: str = ""
    collect: Callable[[list[str]], Any] | None = None


def gib(text: str) -> int:
    """Convert a finite number of GiB above 0 to bytes."""
    size_bytes = float(text) * GIB
    if not 0 < size_bytes < math.inf:
        raise ValueError(f"{text} GiB is not a finite number above 0")
    return int(size_bytes)


UNITS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "s": (float, "SECONDS"),
    "bytes": (gib, "GIB"),
}
"""Conversion and placeholder of a field with a unit, by the last word of its name."""


def add_options(
    parser: argparse._ActionsContainer, record: type, options: Sequence[Option]
) -> None:
    """Add options for fields of a record, whose docstring has an ``Attributes:`` section."""
    documented, defaults = attribute_docs(record), record()
    for option in options:
        default = getattr(defaults, option.field)
        text = option.help or _NONE.sub(r" (default: \1)", documented[option.field])
        stem, _, unit = option.field.rpartition("_")
        parse, metavar = UNITS.get(unit, (None, "N" if option.parse is int else unit.upper()))
        flag = option.flag or "--" + (stem if unit in UNITS else option.field).replace("_", "-")
        settings: dict[str, Any] = {"dest": option.field, "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            if default and not option.flag:
                flag = flag.replace("--", "--no-", 1)
            settings["action"] = "store_false" if default else "store_true"
        else:
            settings["metavar"] = option.metavar or metavar
            if parse := option.parse or parse:
                settings["type"] = _reporting(parse)
            if option.collect is not None:
                settings["action"] = "append"
            if not option.help and isinstance(default, str | int | float) and default != "":
                text += f" (default: {default})"
        parser.add_argument(flag, help=text.replace("%", "%%"), **settings)


def read_options(
    arguments: argparse.Namespace,
    record: Callable[..., R],
    options: Sequence[Option],
    **others: Any,
) -> R:
    """Build a record from the options that were given, and defaults of other fields.

    Raises:
        ValueError: the record refuses a value or a combination.
    """
    for option in options:
        if hasattr(arguments, option.field):
            value = getattr(arguments, option.field)
            others[option.field] = option.collect(value) if option.collect else value
    return record(**others)


def _reporting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show the message of a refused value instead of the name of the converter."""
    if isinstance(parse, type):
        return parse

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert
