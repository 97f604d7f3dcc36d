"""Whole answers, by stage: through each exported bundle, and with PyTorch in place of graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from coprs_deploy.benchmarks.case import Case, Group, Plan, SceneEvaluator
from coprs_deploy.benchmarks.mask_judge import judge_masks, read_masks
from coprs_deploy.benchmarks.report import Accuracy
from coprs_deploy.benchmarks.suites.engines import precisions, runtime_name
from coprs_deploy.benchmarks.workshop import Model, Workshop, version_of
from coprs_deploy.export.precision import FP32

NAME = "answer"
SUMMARY = "whole answers by stage"

SUBJECTS = "coprs_deploy.benchmarks.answer_subjects"

COUNT, QUICK_COUNT = 16, 8
"""Scenes that are asked about in turn."""


def plan(workshop: Workshop) -> Plan:
    """Plan a row for each runtime and precision that a bundle exists for or is made for."""
    model = workshop.model
    present, left_out = workshop.runtimes(NAME)
    reference = f"coprs-deploy modules, PyTorch {version_of('torch')} eager cpu fp32"
    cases = [*_graph_cases(workshop, model, present)]
    if model.checkpoint is not None:
        cases.append(
            Case(
                name=reference,
                target=f"{SUBJECTS}:open_torch_answers",
                settings={"checkpoint": str(model.checkpoint), "count": _count(workshop)},
                labels=_labels(model, "torch eager", "fp32", "cpu"),
                estimated_bytes=model.answer_bytes,
            )
        )
    kept = [case for case in cases if workshop.wants(_group_name(model), case.name)]
    if not kept:
        return Plan((), tuple(left_out))
    group = Group(
        suite=NAME,
        name=_group_name(model),
        cases=tuple(kept),
        baseline=reference if any(c.name == reference for c in kept) else kept[0].name,
        judge=judge(reference, model.has_truth),
        unit="one answer to one question",
    )
    return Plan((group,), tuple(left_out))


def _graph_cases(workshop: Workshop, model: Model, present: list[tuple[str, str]]) -> list[Case]:
    cases = []
    # What a lower precision costs and gains shows in the graphs; the policy stays the same.
    only = FP32 if model.checkpoint is not None else None
    wanted = [(r, p, d) for r, d in present for _, p in precisions(model, [r]) if only in (p, None)]
    for runtime, precision, device in wanted:
        name = runtime_name(runtime, device, precision)
        if not workshop.wants(_group_name(model), name):
            continue
        bundle = workshop.bundle(model, runtime, precision)
        for kept in (False,) if workshop.is_quick else (False, True):
            cases.append(
                Case(
                    name=f"{name}, {'picture seen before' if kept else 'new picture'}",
                    target=f"{SUBJECTS}:open_answers",
                    settings={
                        "bundle": str(bundle.path),
                        "runtime": runtime,
                        "count": _count(workshop),
                        "device": device,
                        "kept": kept,
                    },
                    labels=_labels(model, runtime, precision, device),
                    estimated_bytes=model.answer_bytes,
                    problem=bundle.problem,
                )
            )
    return cases


def _count(workshop: Workshop) -> int:
    return QUICK_COUNT if workshop.is_quick else COUNT


def _group_name(model: Model) -> str:
    return f"{model.name}: whole answers"


def _labels(model: Model, runtime: str, precision: str, device: str) -> dict[str, str]:
    return {"model": model.name, "runtime": runtime, "precision": precision, "device": device}


def judge(reference: str, has_truth: bool) -> SceneEvaluator:
    """Compare the masks of rows with those of the reference row and with the true ones."""

    def compare(outputs: Mapping[str, Path]) -> Mapping[str, Accuracy]:
        masks = read_masks(outputs)
        return judge_masks(masks, masks.get(reference), has_truth)

    return compare
