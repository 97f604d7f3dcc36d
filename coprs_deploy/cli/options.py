"""Command-line options from the fields of option records.

A record (a frozen dataclass) documents each of its settings once, in the ``Attributes:`` section of
its docstring. An :class:`Option` names a field and what differs on the command line; name, help
text and default come from the record. An option that is not given leaves the record's own default.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

R = TypeVar("R")

GIB = 2**30

_ATTRIBUTE = re.compile(r"    (\w+): (.*)")
_NONE = re.compile(r"; (?:None|empty) (?:selects |for )?(.*)$")


@dataclass(frozen=True)
class Option:
    """One field of a record as a command-line option.

    Attributes:
        field: name of the field.
        flag: name of the option; empty derives it from the field (``--num-threads``), or, for a
            field that is true by default, its negation (``--no-cuda-graphs``).
        parse: conversion of the text, which raises ``ValueError`` on a bad one.
        metavar: placeholder of the value in the help text.
        choices: accepted values, where the parser can check them.
        help: help text, where the attribute's own does not fit.
        repeat: whether the option may be given several times; the field gets all values.
    """

    field: str
    flag: str = ""
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    choices: Sequence[str] | None = None
    help: str = ""
    repeat: bool = False


def gib(text: str) -> int:
    """Convert a number of GiB to bytes.

    Raises:
        ValueError: the text is not a number above 0.
    """
    size = float(text)
    if not size > 0:
        raise ValueError(f"{text} GiB is not above 0")
    return int(size * GIB)


def add_options(
    parser: argparse._ActionsContainer, record: type, options: Sequence[Option]
) -> None:
    """Add options for fields of a record.

    Args:
        parser: the parser, or a group of it.
        record: a dataclass with defaults, whose docstring has an ``Attributes:`` section.
        options: the fields to expose, in the order of the help text.
    """
    documented, defaults = attribute_docs(record), record()
    for option in options:
        default = getattr(defaults, option.field)
        text = option.help or _NONE.sub(r" (default: \1)", documented[option.field])
        flag = option.flag or "--" + option.field.replace("_", "-")
        settings: dict[str, Any] = {"dest": option.field, "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            if default and not option.flag:
                flag = flag.replace("--", "--no-", 1)
            settings["action"] = "store_false" if default else "store_true"
        else:
            settings["metavar"] = option.metavar or (None if option.choices else _metavar(option))
            settings["choices"] = option.choices
            if option.parse is not None:
                settings["type"] = _reporting(option.parse)
            if option.repeat:
                settings["action"] = "append"
            if isinstance(default, str | int | float) and default != "":
                text += f" (default: {default})"
        parser.add_argument(flag, help=text.replace("%", "%%"), **settings)


def read_options(
    arguments: argparse.Namespace, record: Callable[..., R], options: Sequence[Option]
) -> R:
    """Build a record from the options that were given.

    Args:
        arguments: what the parser returned.
        record: the dataclass.
        options: those passed to :func:`add_options`.

    Raises:
        ValueError: the record refuses a value or a combination.
    """
    given = {o.field: getattr(arguments, o.field) for o in options if hasattr(arguments, o.field)}
    return record(**given)


def attribute_docs(record: type) -> dict[str, str]:
    """Return the attribute descriptions in a class docstring and those of its bases."""
    documented: dict[str, str] = {}
    for base in reversed(record.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        name = ""
        for line in itertools.takewhile(str.strip, section.splitlines()):
            if found := _ATTRIBUTE.match(line):
                name, documented[found[1]] = found[1], found[2]
            else:
                documented[name] += " " + line.strip()
    return {name: text.replace("``", "").rstrip(".") for name, text in documented.items()}


def _metavar(option: Option) -> str:
    return "N" if option.parse is int else option.field.rpartition("_")[2].upper()


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
