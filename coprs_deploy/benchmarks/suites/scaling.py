"""How time grows: targets and questions on an image, pictures at once, size of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.benchmarks.arrays import read_inputs
from coprs_deploy.benchmarks.case import Case, Group, Plan, Subject
from coprs_deploy.benchmarks.process import WorkerError
from coprs_deploy.benchmarks.report import LeftOut
from coprs_deploy.benchmarks.workshop import Exported, Workshop
from coprs_deploy.bundle import Bundle, read_manifest
from coprs_deploy.engines import RunnerOptions, Stages, open_bundle_graph
from coprs_deploy.images import PreparedImage

NAME = "scaling"
SUMMARY = "targets, questions and pictures at once, and the size of a picture"

SUBJECTS = "coprs_deploy.benchmarks.answer_subjects"

TARGETS_PROFILE = "1,4,16"
TARGETS = (1, 2, 4, 8, 16)
QUESTIONS = (1, 2, 4, 8)
PICTURES = (1, 2, 4, 8)
SIDES = (128, 512, 1024, 2048, 4096)


def plan(workshop: Workshop) -> Plan:
    """Plan one group for each thing that grows."""
    model = workshop.model
    left_out: list[LeftOut] = []
    groups = []
    labels = {"model": model.name, "runtime": "onnxruntime", "precision": "fp32", "device": "cpu"}
    for chosen in workshop.models():
        many = workshop.bundle(chosen, "onnxruntime", "fp32", TARGETS_PROFILE)
        try:
            inputs = workshop.inputs(chosen)
        except WorkerError as error:
            left_out.append(LeftOut(NAME, chosen.name, str(error)))
            continue
        cases = [
            _targets_case(many, inputs, count, {**labels, "model": chosen.name})
            for count in TARGETS
        ]
        groups.append(
            _group(f"{chosen.name}: prior and mask decoder, targets on one image", "targets", cases)
        )
    bundle = workshop.bundle(model, "onnxruntime", "fp32")
    for title, parameter, values, target, key in (
        (
            "questions on one picture, time of one",
            "questions",
            QUESTIONS,
            "open_questions",
            "questions",
        ),
        ("pictures at once, time of one", "pictures", PICTURES, "open_pictures", "pictures"),
        ("side of the picture in pixels", "side", SIDES, "open_answers", "side"),
    ):
        extra = {"count": 4} if key == "side" else {}
        cases = [
            Case(
                name=f"{value} {parameter}" if key != "side" else f"{value} x {value} pixels",
                target=f"{SUBJECTS}:{target}",
                settings={"bundle": str(bundle.path), key: value, **extra},
                labels={**labels, parameter: str(value)},
                problem=bundle.problem,
                estimated_bytes=model.answer_bytes,
            )
            for value in values
        ]
        groups.append(_group(f"{model.name}: {title}", parameter, cases))
    kept = tuple(group for group in groups if workshop.wants(group.name))
    return Plan(kept, tuple(left_out))


def _group(name: str, parameter: str, cases: list[Case]) -> Group:
    return Group(
        NAME, name, tuple(cases), cases[0].name, unit="as the name says", parameter=parameter
    )


def _targets_case(bundle: Exported, inputs: str, count: int, labels: dict[str, str]) -> Case:
    return Case(
        name=f"{count} targets",
        target=f"{__name__}:open_targets",
        settings={"bundle": str(bundle.path), "inputs": inputs, "count": count},
        labels={**labels, "targets": str(count)},
        problem=bundle.problem,
    )


def open_targets(bundle: str, inputs: str, count: int, device: str = "cpu") -> Subject:
    """Open prior and mask decoder for several targets on one image."""
    return _Targets(bundle, inputs, count, device)


class _Targets(Subject):
    def __init__(self, bundle: str, inputs: str, count: int, device: str) -> None:
        opened = Bundle(Path(bundle), read_manifest(bundle))
        options = RunnerOptions(device=device)
        graphs = opened.manifest.graphs
        self._stages = Stages({n: open_bundle_graph(opened, n, options) for n in graphs})
        sample = next(read_inputs(inputs))
        size = (int(sample["original_size"][0]), int(sample["original_size"][1]))
        prepared = PreparedImage(sample["image"], sample["unpadded_size"], size)
        self._size = sample["unpadded_size"]
        self._embedding = self._stages.encode(prepared)
        self._concentrations: Any = np.repeat(sample["concentration"][:1], count, axis=0)

    def run(self) -> Mapping[str, float]:
        """Score and decode all targets, up to the masks on the host."""
        chunks = self._stages.priors(self._embedding, self._concentrations)
        for mask in self._stages.masks(self._embedding, chunks, self._size):
            mask.numpy()
        return {}

    def close(self) -> None:
        self._stages.close()
