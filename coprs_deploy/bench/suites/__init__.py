"""Suites: one function each, which plans what is measured; a new one is a line below."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coprs_deploy.bench.case import Planned
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.suites import graphs, requests

SUITES: Mapping[str, Callable[[Fixtures], Planned]] = {
    "engines": graphs.plan_engines,
    "answer": requests.plan_answer,
    "policy": requests.plan_policy,
    "start": requests.plan_start,
    "scaling": requests.plan_scaling,
    "export": graphs.plan_export,
    "precision": graphs.plan_precision,
}
"""Function of each suite, by the name that users type."""

DEFAULT_SUITES = ("engines", "answer", "start")
"""What runs without ``--suite``: within three minutes for the demo model on two idle cores."""

SCENE_SUITES = ("answer", "start", "scaling")
"""Suites with requests on generated scenes, which are square."""
