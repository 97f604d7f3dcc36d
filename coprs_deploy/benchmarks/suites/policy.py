"""The policy alone, by each library in each dtype: reading the prompt, writing the response."""

from __future__ import annotations

from coprs_deploy import policy
from coprs_deploy.benchmarks.case import Case, Group, Plan
from coprs_deploy.benchmarks.report import LeftOut
from coprs_deploy.benchmarks.workshop import Model, Workshop, version_of

NAME = "policy"
SUMMARY = "the policy alone: prefill and decode"

COUNT = 8

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
"""Of the weights, as torch and as this package name them."""


def plan(workshop: Workshop) -> Plan:
    """Plan a row for each library that is here, on each device in each dtype."""
    model = workshop.model
    if model.checkpoint is None:
        reason = "the policy is measured from its checkpoint; name it with --checkpoint"
        return Plan((), (LeftOut(NAME, model.name, reason),))
    left_out, cases = [], []
    for entry in policy.availability():
        if not entry.is_available:
            left_out.append(LeftOut(NAME, entry.name, entry.detail, entry.remedy))
            continue
        for device in workshop.devices:
            cases += [_case(model, entry.name, device, dtype) for dtype in DTYPES]
    group = f"{model.name}: policy"
    kept = tuple(case for case in cases if workshop.wants(group, case.name))
    if not kept:
        return Plan((), tuple(left_out))
    float32 = [case.name for case in kept if case.labels["precision"] == "fp32"]
    judge = workshop.policy_judge(model, float32, COUNT)
    measured = Group(NAME, group, kept, kept[0].name, judge, unit="one response")
    return Plan((measured,), tuple(left_out))


def _case(model: Model, library: str, device: str, dtype: str) -> Case:
    version = version_of(library, f"{library}-{device}")
    return Case(
        name=f"{library} {version} {device} {dtype}",
        target="coprs_deploy.benchmarks.answer_subjects:open_policy_alone",
        settings={
            "checkpoint": str(model.checkpoint),
            "count": COUNT,
            "library": library,
            "dtype": dtype,
            "device": device,
        },
        labels={
            "model": model.name,
            "runtime": library,
            "precision": DTYPES[dtype],
            "device": device,
        },
        estimated_bytes=model.answer_bytes,
    )
