"""Descriptions of option records, each written once: in the docstring of its class."""

from __future__ import annotations

import inspect
import itertools
import re

_ATTRIBUTE = re.compile(r"    (\w+): (.*)")


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
