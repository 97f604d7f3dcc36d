"""What half precision costs: every rounding of a typed graph explicit, on held-out scenes.

This is the accuracy that a GPU will have, computed on any CPU; no time is measured.
"""

from __future__ import annotations

from functools import partial

from coprs_deploy.bench.case import Case, Group, SuitePlan
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.graph_workloads import ALL_GRAPHS
from coprs_deploy.bench.report import Skipped
from coprs_deploy.bench.suites import labels_of
from coprs_deploy.export.precision import BF16, FP16, FP32

NAME = "precision"
SUMMARY = "accuracy of fp16 and bf16 with every rounding explicit, no time"

SCENES = 128


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List a case for each precision of the requested model."""
    model, checkpoint = fixtures.model, str(fixtures.model.checkpoint)
    if model.checkpoint is None:
        reason = "the graphs are made from a checkpoint; name it with --checkpoint"
        return SuitePlan((), (Skipped(NAME, model.name, reason),))
    count = SCENES if model.has_gt else None

    def prepare(precision: str) -> dict[str, str]:
        name, settings = f"{model.name}-rounded-{precision}", {"checkpoint": checkpoint}
        folder = fixtures.make(name, "write_rounded_graphs", precision=precision, **settings)
        return settings | {"folder": str(folder), "inputs": fixtures.inputs(model, count)}

    target, cases = "coprs_deploy.bench.graph_workloads:open_rounded_graphs", []
    for precision in (FP32, FP16, BF16):
        labels = labels_of(model, precision=precision, graph=ALL_GRAPHS)
        name, make = f"{precision}, explicit roundings", partial(prepare, precision)
        cases.append(Case(name, target, {}, labels, make))
    evaluate, name = fixtures.evaluate_graphs(model, count), f"{model.name}: half precision"
    return SuitePlan((Group(NAME, name, tuple(cases), None, evaluate, "one input", runs=0),))
