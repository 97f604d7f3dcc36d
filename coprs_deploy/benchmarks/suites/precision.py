"""What half precision costs: every rounding of a typed graph written out, on held-out scenes.

This is the accuracy that a GPU will have, computed on any CPU; no time is measured.
"""

from __future__ import annotations

from pathlib import Path

from coprs_deploy.benchmarks.case import Case, Group, Plan, Subject
from coprs_deploy.benchmarks.graph_subjects import CHAIN, RunnerSubject
from coprs_deploy.benchmarks.process import WorkerError, call_once
from coprs_deploy.benchmarks.report import LeftOut
from coprs_deploy.benchmarks.workshop import PREPARE_SECONDS, STEPS, Workshop
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import RunnerOptions, open_graph
from coprs_deploy.export.precision import BF16, FP16, FP32
from coprs_deploy.specs import GRAPH_NAMES, graph_specs

NAME = "precision"
SUMMARY = "accuracy of fp16 and bf16 with every rounding written out, no time"

SCENES = 128


def plan(workshop: Workshop) -> Plan:
    """Plan a row for each precision of the model that was asked for."""
    model = workshop.model
    if model.checkpoint is None:
        reason = "the graphs are made from a checkpoint; name it with --checkpoint"
        return Plan((), (LeftOut(NAME, model.name, reason),))
    try:
        inputs = workshop.inputs(model, SCENES if model.has_truth else None)
    except WorkerError as error:
        return Plan((), (LeftOut(NAME, model.name, f"inputs could not be made: {error}"),))
    cases = []
    for precision in (FP32, FP16, BF16):
        folder, problem = workshop.folder / f"{model.name}-rounded-{precision}", ""
        workshop.progress(f"{model.name}: {precision} with its roundings written out")
        try:
            call_once(
                f"{STEPS}:write_rounded_graphs",
                PREPARE_SECONDS,
                checkpoint=str(model.checkpoint),
                folder=str(folder),
                precision=precision,
            )
        except WorkerError as error:
            problem = str(error)
        cases.append(
            Case(
                name=f"{precision}, roundings written out",
                target=f"{__name__}:open_rounded",
                settings={
                    "checkpoint": str(model.checkpoint),
                    "folder": str(folder),
                    "inputs": inputs,
                },
                labels={"model": model.name, "graph": CHAIN, "precision": precision},
                problem=problem,
            )
        )
    group = Group(
        suite=NAME,
        name=f"{model.name}: half precision",
        cases=tuple(cases),
        judge=workshop.judge(model, inputs),
        unit="no time is measured",
        runs=0,
    )
    return Plan((group,))


def open_rounded(checkpoint: str, folder: str, inputs: str) -> Subject:
    """Open the three graphs of a precision with their roundings written out."""
    config = read_checkpoint(checkpoint).config.model
    specs = graph_specs(config.geometry, config.policy_width)
    runners = {
        name: open_graph("onnxruntime", Path(folder) / f"{name}.onnx", specs[name], RunnerOptions())
        for name in GRAPH_NAMES
    }
    return RunnerSubject(runners, inputs, "cpu")
