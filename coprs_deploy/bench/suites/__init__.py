"""Suites: one function each, which plans what is measured; a new one is a line below."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coprs_deploy.bench.case import Planned
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.suites import answer, engines, export, policy, precision, scaling, start

SUITES: Mapping[str, Callable[[Fixtures], Planned]] = {
    "engines": engines.plan,
    "answer": answer.plan,
    "policy": policy.plan,
    "start": start.plan,
    "scaling": scaling.plan,
    "export": export.plan,
    "precision": precision.plan,
}
"""Function of each suite, by the name that users type."""

DEFAULT_SUITES = ("engines", "answer", "start")
"""What runs without ``--suite``: within three minutes for the demo model on two idle cores."""

SCENE_SUITES = ("answer", "start", "scaling")
"""Suites with requests on generated scenes, which are square."""
