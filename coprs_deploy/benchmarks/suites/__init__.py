"""The suites: one module each, which plans what it measures here. A new one is a line below.

A suite's module defines ``NAME``, ``SUMMARY`` and ``plan``; see :class:`Suite`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

from coprs_deploy.benchmarks.case import Plan
from coprs_deploy.benchmarks.workshop import Workshop

SUITES: Mapping[str, str] = {
    "engines": "coprs_deploy.benchmarks.suites.engines",
    "answer": "coprs_deploy.benchmarks.suites.answer",
    "policy": "coprs_deploy.benchmarks.suites.policy",
    "start": "coprs_deploy.benchmarks.suites.start",
    "scaling": "coprs_deploy.benchmarks.suites.scaling",
    "export": "coprs_deploy.benchmarks.suites.export",
    "precision": "coprs_deploy.benchmarks.suites.precision",
}
"""Module of each suite, by the name that users type."""

DEFAULT_SUITES = ("engines", "answer", "start")
"""What runs when none is named: within three minutes for the shipped model on two idle cores."""


class Suite(Protocol):
    """What a module of a suite defines."""

    NAME: str
    SUMMARY: str

    def plan(self, workshop: Workshop) -> Plan:
        """Prepare what is to be measured, and say what cannot be measured here."""


def suite(name: str) -> Suite:
    """Import a suite.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}; accepted: {', '.join(SUITES)}")
    return cast(Suite, importlib.import_module(SUITES[name]))
