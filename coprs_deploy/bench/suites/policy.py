"""The policy alone, by each library in each dtype: prefill and decode."""

from __future__ import annotations

import itertools

from coprs_deploy import policy
from coprs_deploy.bench.availability import version_of
from coprs_deploy.bench.case import Case, Group, SuitePlan
from coprs_deploy.bench.fixtures import Fixtures
from coprs_deploy.bench.report import Skipped
from coprs_deploy.bench.suites import labels_of

NAME = "policy"
SUMMARY = "the policy alone: prefill and decode"

COUNT = 8
"""Number of scenes, used in turn."""

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List a case for each library that is here, on each device in each dtype."""
    model = fixtures.model
    if model.checkpoint is None:
        reason = "the policy is measured from its checkpoint; name it with --checkpoint"
        return SuitePlan((), (Skipped(NAME, model.name, reason),))
    entries, shared = policy.availability(), {"checkpoint": str(model.checkpoint), "count": COUNT}
    missing = (entry for entry in entries if not entry.is_available)
    skipped = [Skipped(NAME, entry.name, entry.detail, entry.remedy) for entry in missing]
    libraries = [entry.name for entry in entries if entry.is_available]
    target, cases = "coprs_deploy.bench.answer_workloads:open_policy_alone", []
    for kind in itertools.product(libraries, fixtures.options.devices, DTYPES):
        library, device, dtype = kind
        name = f"{library} {version_of(library, f'{library}-{device}')} {device} {dtype}"
        settings = shared | {"library": library, "dtype": dtype, "device": device}
        labels = labels_of(model, library, DTYPES[dtype], device)
        case = Case(name, target, settings, labels, estimated_bytes=model.request_bytes)
        cases.append(case)
    references = [case.name for case in cases if case.labels["precision"] == "fp32"]
    compared = {"references": references, "has_gt": model.has_gt, **shared}
    evaluate = fixtures.evaluate("evaluate_policies", **compared)
    name, baseline = f"{model.name}: policy", cases[0].name if cases else None
    group = Group(NAME, name, tuple(cases), baseline, evaluate, "one response")
    return SuitePlan((group,), tuple(skipped))
