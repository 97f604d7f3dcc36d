"""What half precision costs: every rounding of a typed graph explicit, on held-out scenes.

This is the accuracy that a GPU will have, computed on any CPU; no time is measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import ALL_GRAPHS, Fixtures
from coprs_deploy.bench.report import Skipped
from coprs_deploy.export.precision import BF16, FP16, FP32

SCENES = 128


def plan(fixtures: Fixtures) -> Planned:
    """Plan a case for each precision of the requested model."""
    model, settings = fixtures.model, {"checkpoint": fixtures.model.checkpoint}
    if model.checkpoint is None:
        reason = "the graphs are made from a checkpoint; name it with --checkpoint"
        yield Skipped(model.name, reason)
        return

    def prepare(precision: str) -> dict[str, Any]:
        name = f"{model.name}-rounded-{precision}-{model.fingerprint}"
        folder = fixtures.make(name, "write_rounded_graphs", precision=precision, **settings)
        inputs = fixtures.inputs(model, SCENES if model.has_gt else None)
        return {"folder": folder, "inputs": inputs}

    target, cases = "coprs_deploy.bench.graph_workloads:open_rounded_graphs", []
    for precision in (FP32, FP16, BF16):
        labels = model.labels(precision=precision, graph=ALL_GRAPHS)
        name, make = f"{precision}, explicit roundings", partial(prepare, precision)
        cases.append(Case(name, target, settings, labels, make))
    yield Group(f"{model.name}: half precision", tuple(cases), unit="one input", runs=0)
