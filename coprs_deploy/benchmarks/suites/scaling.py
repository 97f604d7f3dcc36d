"""How time grows: targets and questions on an image, images and pictures at once, their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.benchmarks.arrays import OUTPUT_FILE, Values, read_inputs, write_arrays
from coprs_deploy.benchmarks.case import Case, Group, Plan, SceneEvaluator, Subject
from coprs_deploy.benchmarks.form import Form
from coprs_deploy.benchmarks.process import WorkerError
from coprs_deploy.benchmarks.report import Accuracy, LeftOut
from coprs_deploy.benchmarks.workshop import SUBJECTS, Model, Workshop
from coprs_deploy.bundle import Bundle, read_manifest
from coprs_deploy.engines import DeviceTensor, RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.graphs import join_chunks
from coprs_deploy.images import PreparedImage
from coprs_deploy.specs import IMAGE_ENCODER

NAME = "scaling"
SUMMARY = "targets, questions and pictures at once, and the size of a picture"

RUNTIME = "onnxruntime"

TARGETS_PROFILE = "1,4,16"
TARGETS = (1, 2, 4, 8, 16)
IMAGES_PROFILE = "1,2,8"
IMAGES = (1, 2, 4, 8)
QUESTIONS = (1, 2, 4, 8)
QUESTION_PICTURES = 8
PICTURES = (1, 2, 4, 8)
SIDES = (128, 512, 1024, 2048, 4096)
SIDE_PICTURES = 4


@dataclass(frozen=True)
class _Growth:
    """One thing that grows in whole answers.

    Attributes:
        title: of its group.
        parameter: its name.
        values: how much of it.
        target: what opens a row.
        form: how a row is called.
        count: how many scenes are asked about in turn; None asks about as many as the value says.
    """

    title: str
    parameter: str
    values: tuple[int, ...]
    target: str
    form: str
    count: int | None


GROWTHS = (
    _Growth(
        "questions on one picture, time of one",
        "questions",
        QUESTIONS,
        "open_questions",
        "{} questions",
        QUESTION_PICTURES,
    ),
    _Growth(
        "pictures at once, time of one",
        "pictures",
        PICTURES,
        "open_pictures",
        "{} pictures",
        None,
    ),
)


def plan(workshop: Workshop) -> Plan:
    """Plan one group for each thing that grows, on each device."""
    devices, left_out = workshop.devices_of(RUNTIME, NAME)
    groups: list[Group] = []
    for device in devices:
        for chosen in workshop.models():
            try:
                groups += [_targets(workshop, chosen, device), _images(workshop, chosen, device)]
            except WorkerError as error:
                left_out.append(LeftOut(NAME, chosen.name, str(error)))
        groups += [_growth(workshop, growth, device) for growth in GROWTHS]
        groups.append(_sides(workshop, device))
    kept = [
        replace(group, cases=tuple(c for c in group.cases if workshop.wants(group.name, c.name)))
        for group in groups
    ]
    return Plan(tuple(group for group in kept if group.cases), tuple(left_out))


def _labels(model: Model, device: str, **values: int) -> dict[str, str]:
    kinds = {"model": model.name, "runtime": RUNTIME, "precision": "fp32", "device": device}
    return {**kinds, **{name: str(value) for name, value in values.items()}}


def _group_name(model: Model, title: str, device: str) -> str:
    return f"{model.name}: {title}" + ("" if device == "cpu" else f", on {device}")


def _group(name: str, parameter: str, cases: list[Case], judge: SceneEvaluator | None) -> Group:
    return Group(
        NAME, name, tuple(cases), cases[0].name, judge, unit="as the name says", parameter=parameter
    )


def _targets(workshop: Workshop, model: Model, device: str) -> Group:
    many = workshop.bundle(model, RUNTIME, "fp32", Form(targets=TARGETS_PROFILE))
    inputs = workshop.inputs(model)
    cases = [
        Case(
            name=f"{count} targets",
            target=f"{__name__}:open_targets",
            settings={
                "bundle": str(many.path),
                "inputs": inputs,
                "count": count,
                "device": device,
            },
            labels=_labels(model, device, targets=count),
            problem=many.problem,
        )
        for count in TARGETS
    ]
    name = _group_name(model, "prior and mask decoder, targets on one image", device)
    return _group(name, "targets", cases, workshop.judge(model, inputs))


def _images(workshop: Workshop, model: Model, device: str) -> Group:
    many = workshop.bundle(model, RUNTIME, "fp32", Form(images=IMAGES_PROFILE))
    inputs = workshop.inputs(model)
    cases = [
        Case(
            name=f"{count} images",
            target=f"{__name__}:open_images",
            settings={
                "bundle": str(many.path),
                "inputs": inputs,
                "count": count,
                "device": device,
            },
            labels=_labels(model, device, images=count),
            problem=many.problem,
            estimated_bytes=count * model.estimated_bytes,
        )
        for count in IMAGES
    ]
    name = _group_name(model, "image encoder, images in one call", device)
    return _group(name, "images", cases, workshop.judge(model, inputs))


def _growth(workshop: Workshop, growth: _Growth, device: str) -> Group:
    model = workshop.model
    bundle = workshop.bundle(model, RUNTIME, "fp32")
    settings: dict[str, Any] = {"bundle": str(bundle.path), "device": device}
    if growth.count is not None:
        settings["count"] = growth.count
    cases = [
        Case(
            name=growth.form.format(value),
            target=f"{SUBJECTS}:{growth.target}",
            settings={**settings, growth.parameter: value},
            labels=_labels(model, device, **{growth.parameter: value}),
            problem=bundle.problem,
            estimated_bytes=model.answer_bytes,
        )
        for value in growth.values
    ]
    judge = workshop.answers_judge(model, growth.count or max(growth.values))
    return _group(_group_name(model, growth.title, device), growth.parameter, cases, judge)


def _sides(workshop: Workshop, device: str) -> Group:
    model = workshop.model
    bundle = workshop.bundle(model, RUNTIME, "fp32")
    cases = [
        Case(
            name=f"{side} x {side} pixels",
            target=f"{SUBJECTS}:open_answers",
            settings={
                "bundle": str(bundle.path),
                "side": side,
                "count": SIDE_PICTURES,
                "device": device,
            },
            labels=_labels(model, device, side=side),
            problem=bundle.problem,
            estimated_bytes=model.answer_bytes,
        )
        for side in SIDES
    ]
    judges = {
        case.name: workshop.answers_judge(model, SIDE_PICTURES, side)
        for case, side in zip(cases, SIDES, strict=True)
    }

    def judge(outputs: Mapping[str, Path]) -> Mapping[str, Accuracy]:
        """Judge each row by the answers to pictures of its own size."""
        return {name: judges[name]({name: path})[name] for name, path in outputs.items()}

    return _group(_group_name(model, "side of the picture in pixels", device), "side", cases, judge)


def open_images(bundle: str, inputs: str, count: int, device: str = "cpu") -> Subject:
    """Open the image encoder for several images in one call."""
    return _Images(bundle, inputs, count, device)


class _Images(Subject):
    def __init__(self, bundle: str, inputs: str, count: int, device: str) -> None:
        opened = Bundle(Path(bundle), read_manifest(bundle))
        self._encoder = open_bundle_graph(opened, IMAGE_ENCODER, RunnerOptions(device=device))
        self._inputs, self._count = inputs, count
        self._images = self._stack(next(read_inputs(inputs)))

    def _stack(self, sample: Values) -> Any:
        return np.repeat(sample["image"], self._count, axis=0)

    def run(self) -> Mapping[str, float]:
        """Encode all images in one call, up to the embeddings on the host."""
        self._encoder(image=self._images)["image_embedding"].numpy()
        return {}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the embedding of the last image of each call."""
        found = {}
        for index, sample in enumerate(read_inputs(self._inputs)):
            encoded = self._encoder(image=self._stack(sample))["image_embedding"]
            found[f"{index}.image_embedding"] = encoded.numpy()[-1:]
        write_arrays(folder / OUTPUT_FILE, found)
        return {}

    def close(self) -> None:
        self._encoder.close()


def open_targets(bundle: str, inputs: str, count: int, device: str = "cpu") -> Subject:
    """Open prior and mask decoder for several targets on one image."""
    return _Targets(bundle, inputs, count, device)


class _Targets(Subject):
    def __init__(self, bundle: str, inputs: str, count: int, device: str) -> None:
        opened = Bundle(Path(bundle), read_manifest(bundle))
        options = RunnerOptions(device=device)
        graphs = opened.manifest.graphs
        self._stages = SegmentationGraphs(
            {n: open_bundle_graph(opened, n, options) for n in graphs}
        )
        self._inputs, self._count = inputs, count
        self._asked = self._prepare(next(read_inputs(inputs)))

    def _prepare(self, sample: Values) -> tuple[DeviceTensor, Any, Any]:
        size = (int(sample["original_size"][0]), int(sample["original_size"][1]))
        prepared = PreparedImage(sample["image"], sample["unpadded_size"], size)
        concentrations = np.repeat(sample["concentration"][:1], self._count, axis=0)
        return self._stages.encode(prepared), concentrations, sample["unpadded_size"]

    def run(self) -> Mapping[str, float]:
        """Score and decode all targets, up to the masks on the host."""
        _, masks = self._stages.priors_and_masks(*self._asked)
        for mask in masks:
            mask.numpy()
        return {}

    def finish(self, folder: Path) -> Mapping[str, Any]:
        """Leave the mask logits of the last target of each input."""
        found = {}
        for index, sample in enumerate(read_inputs(self._inputs)):
            _, masks = self._stages.priors_and_masks(*self._prepare(sample))
            found[f"{index}.mask_logits"] = join_chunks(masks, self._count)[-1:]
        write_arrays(folder / OUTPUT_FILE, found)
        return {}

    def close(self) -> None:
        self._stages.close()
