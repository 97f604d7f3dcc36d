"""Whole requests by stage: through each exported bundle, and with PyTorch in place of graphs."""

from __future__ import annotations

import itertools
from functools import partial

from coprs_deploy.bench.availability import runtimes_here, version_of
from coprs_deploy.bench.case import Case, Group, SuitePlan
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.suites import labels_of
from coprs_deploy.bench.suites.engines import precisions, runtime_name
from coprs_deploy.export.precision import FP32

NAME = "answer"
SUMMARY = "whole requests, by stage"

COUNT, QUICK_COUNT = 16, 8
"""Number of scenes, used in turn."""


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List a case for each runtime and precision that a bundle exists for or is made for."""
    model, is_quick = fixtures.model, fixtures.options.is_quick
    present, skipped = runtimes_here(NAME, fixtures.options.devices)
    count, memory = QUICK_COUNT if is_quick else COUNT, model.request_bytes

    def prepare(runtime: str, precision: str) -> dict[str, str]:
        return {"bundle": fixtures.bundle(model, runtime, precision)}

    # What a lower precision costs and gains shows in the graphs; the policy stays the same.
    kinds = [(*kind, d) for r, d in present for kind in precisions(model, [r])]
    kinds = [kind for kind in kinds if model.checkpoint is None or kind[1] == FP32]
    cases, target = [], "coprs_deploy.bench.answer_workloads:open_requests"
    for kind, cached in itertools.product(kinds, (False,) if is_quick else (False, True)):
        runtime, precision, device = kind
        name = f"{runtime_name(runtime, device, precision)}, {'cached' if cached else 'new'} image"
        settings = {"runtime": runtime, "device": device, "count": count}
        settings |= {"cached": cached, "max_cached_images": count if cached else 0}
        make = partial(prepare, runtime, precision)
        cases.append(Case(name, target, settings, labels_of(model, *kind), make, memory))
    reference = f"coprs-deploy modules, PyTorch {version_of('torch')} eager cpu fp32"
    if model.checkpoint is not None:
        target = "coprs_deploy.bench.answer_workloads:open_torch_requests"
        settings = {"checkpoint": str(model.checkpoint), "count": count}
        labels = labels_of(model, "torch eager", FP32, "cpu")
        cases.append(Case(reference, target, settings, labels, estimated_bytes=memory))
    evaluate = fixtures.evaluate("evaluate_masks", reference=reference, has_gt=model.has_gt)
    name, unit = f"{model.name}: whole requests", "one request"
    group = Group(NAME, name, tuple(cases), reference, evaluate, unit)
    return SuitePlan((group,), tuple(skipped))
