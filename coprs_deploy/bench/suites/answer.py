"""Whole requests by stage: through each exported bundle, and with PyTorch in place of graphs."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from coprs_deploy.bench.availability import runtimes_here, version_of
from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.suites.engines import precisions, runtime_name
from coprs_deploy.export.precision import FP32

WORKLOADS = "coprs_deploy.bench.answer_workloads"

COUNT, QUICK_COUNT = 16, 8
"""Number of scenes, used in turn."""


def plan(fixtures: Fixtures) -> Planned:
    """Plan a case for each runtime and precision that a bundle exists for or is made for."""
    model, is_quick = fixtures.model, fixtures.options.is_quick
    present, skipped = runtimes_here(fixtures.options.devices)
    yield from skipped
    count, memory = QUICK_COUNT if is_quick else COUNT, model.request_bytes

    def refer() -> dict[str, Any]:
        return {"reference": fixtures.scene_reference(count)}

    def prepare(runtime: str, precision: str) -> dict[str, Any]:
        return refer() | {"bundle": fixtures.bundle(model, runtime, precision)}

    # What a lower precision costs and gains shows in the graphs; the policy stays the same.
    kinds = [(*kind, d) for r, d in present for kind in precisions(model, [r])]
    kinds = [kind for kind in kinds if model.checkpoint is None or kind[1] == FP32]
    cases = []
    for kind, cached in itertools.product(kinds, (False,) if is_quick else (False, True)):
        runtime, precision, device = kind
        name = f"{runtime_name(runtime, device, precision)}, {'cached' if cached else 'new'} image"
        settings = {"runtime": runtime, "device": device, "count": count}
        settings |= {"cached": cached, "max_cached_images": count if cached else 0}
        target, make = f"{WORKLOADS}:open_requests", partial(prepare, runtime, precision)
        cases.append(Case(name, target, settings, model.labels(*kind), make, memory))
    baseline = f"coprs-deploy modules, PyTorch {version_of('torch')} eager cpu fp32"
    if model.checkpoint is not None:
        target, labels = f"{WORKLOADS}:open_torch_requests", ("torch eager", FP32, "cpu")
        settings = {"checkpoint": model.checkpoint, "count": count}
        cases.append(Case(baseline, target, settings, model.labels(*labels), refer, memory))
    yield Group(f"{model.name}: whole requests", tuple(cases), baseline, "one request")
