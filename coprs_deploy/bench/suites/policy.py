"""The policy alone, by each library in each dtype: prefill and decode."""

from __future__ import annotations

import itertools
from typing import Any

from coprs_deploy import policy
from coprs_deploy.bench.availability import version_of
from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.report import Skipped

COUNT = 8
"""Number of scenes, used in turn."""

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def plan(fixtures: Fixtures) -> Planned:
    """Plan a case for each library that is here, on each device in each dtype."""
    model, entries = fixtures.model, policy.availability()
    if model.checkpoint is None:
        reason = "the policy is measured from its checkpoint; name it with --checkpoint"
        yield Skipped(model.name, reason)
        return
    for entry in entries:
        if not entry.is_available:
            yield Skipped(entry.name, entry.detail, entry.remedy)

    def prepare() -> dict[str, Any]:
        return {"reference": fixtures.scene_reference(COUNT)}

    libraries, cases = [entry.name for entry in entries if entry.is_available], []
    for kind in itertools.product(libraries, fixtures.options.devices, DTYPES):
        library, device, dtype = kind
        name = f"{library} {version_of(library, f'{library}-{device}')} {device} {dtype}"
        settings = {"checkpoint": model.checkpoint, "count": COUNT}
        settings |= {"library": library, "dtype": dtype, "device": device}
        labels = model.labels(library, DTYPES[dtype], device)
        target = "coprs_deploy.bench.answer_workloads:open_policy_alone"
        cases.append(Case(name, target, settings, labels, prepare, model.request_bytes))
    baseline = cases[0].name if cases else None
    yield Group(f"{model.name}: policy", tuple(cases), baseline, "one response")
