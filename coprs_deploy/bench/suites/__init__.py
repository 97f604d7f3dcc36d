"""Suites: one module each, which lists what is measured; a new one is a line below."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

from coprs_deploy.bench.case import SuitePlan
from coprs_deploy.bench.fixtures import Fixtures, Model

SUITES: Mapping[str, str] = {
    "engines": "coprs_deploy.bench.suites.engines",
    "answer": "coprs_deploy.bench.suites.answer",
    "policy": "coprs_deploy.bench.suites.policy",
    "start": "coprs_deploy.bench.suites.start",
    "scaling": "coprs_deploy.bench.suites.scaling",
    "export": "coprs_deploy.bench.suites.export",
    "precision": "coprs_deploy.bench.suites.precision",
}
"""Module of each suite, by the name that users type."""

DEFAULT_SUITES = ("engines", "answer", "start")
"""What runs without ``--suite``: within three minutes for the demo model on two idle cores."""

SCENE_SUITES = ("answer", "start", "scaling")
"""Suites with requests on generated scenes, which are square."""


class Suite(Protocol):
    """What the module of a suite defines."""

    NAME: str
    SUMMARY: str

    def suite_plan(self, fixtures: Fixtures) -> SuitePlan:
        """List what is to be measured, and what cannot be measured here."""


def suite(name: str) -> Suite:
    """Import a suite.

    Raises:
        ValueError: there is no suite of that name.
    """
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}; accepted: {', '.join(SUITES)}, all")
    return cast(Suite, importlib.import_module(SUITES[name]))


def labels_of(
    model: Model, runtime: str = "", precision: str = "", device: str = "", **more: object
) -> dict[str, str]:
    """Return the labels of a case; without the empty ones."""
    named = {"runtime": runtime, "precision": precision, "device": device, **more}
    return {"model": model.name} | {name: str(value) for name, value in named.items() if value}
