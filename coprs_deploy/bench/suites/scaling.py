"""Scaling sweeps: targets and questions per image, images per call, image size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from coprs_deploy.bench.availability import runtimes_here
from coprs_deploy.bench.case import Case, Evaluate, Group, SuitePlan
from coprs_deploy.bench.fixtures import ExportVariant, Fixtures, Model
from coprs_deploy.bench.suites import labels_of
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR

NAME = "scaling"
SUMMARY = "targets, questions and images at once, and the size of the image"

RUNTIME = "onnxruntime"

NUM_IMAGES, NUM_SIDE_IMAGES = 8, 4
"""Number of scenes, used in turn, and those of each size."""

COUNTS, SIDES = (1, 2, 4, 8), (128, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class _Sweep:
    """One parameter that grows, on one device."""

    fixtures: Fixtures
    device: str
    parameter: str
    title: str
    values: Sequence[int] = COUNTS
    name: str = "{0} {1}"

    def names(self) -> list[str]:
        return [self.name.format(value, self.parameter) for value in self.values]

    def graphs(self, model: Model, graph: str, variant: ExportVariant, is_large: bool) -> Group:
        """Measure graphs of a bundle with a profile, on repeated inputs."""

        def prepare() -> dict[str, str]:
            bundle = self.fixtures.bundle(model, RUNTIME, "fp32", variant)
            return {"bundle": bundle, "inputs": self.fixtures.inputs(model)}

        target = "coprs_deploy.bench.graph_workloads:open_bundle_graphs"
        settings = [{"graph": graph, "runtime": RUNTIME, "repeat": v} for v in self.values]
        memory = [v * model.estimated_bytes if is_large else 700_000_000 for v in self.values]
        evaluate = self.fixtures.evaluate_graphs(model)
        return self._group(model, target, settings, evaluate, (prepare, memory))

    def requests(self, target: str, scenes: int, **settings: Any) -> Group:
        """Measure whole requests with the model's own bundle."""
        model = self.fixtures.model

        def prepare() -> dict[str, str]:
            return {"bundle": self.fixtures.bundle(model, RUNTIME, "fp32")}

        sides = (
            dict(zip(self.names(), self.values, strict=True)) if self.parameter == "side" else {}
        )
        compared = {"has_gt": model.has_gt, "checkpoint": model.checkpoint, "count": scenes}
        evaluate = self.fixtures.evaluate("evaluate_masks", sides=sides, **compared)
        each = [{self.parameter: value, **settings} for value in self.values]
        memory = [model.request_bytes] * len(each)
        return self._group(model, target, each, evaluate, (prepare, memory))

    def _group(
        self, model: Model, target: str, each: Sequence[Any], evaluate: Evaluate, made: Any
    ) -> Group:
        labels = [
            labels_of(model, RUNTIME, "fp32", self.device, **{self.parameter: value})
            for value in self.values
        ]
        prepare, memory = made
        cases = tuple(
            Case(name, target, {**settings, "device": self.device}, label, prepare, size)
            for name, settings, label, size in zip(self.names(), each, labels, memory, strict=True)
        )
        on_device = "" if self.device == "cpu" else f", on {self.device}"
        name, unit = f"{model.name}: {self.title}{on_device}", "as the name says"
        return Group(NAME, name, cases, cases[0].name, evaluate, unit, self.parameter)


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List a group for each sweep on each device."""
    present, skipped = runtimes_here(NAME, fixtures.options.devices, RUNTIME)
    groups = [group for _, device in present for group in _groups(fixtures, device)]
    return SuitePlan(tuple(groups), tuple(skipped))


def _groups(fixtures: Fixtures, device: str) -> Iterator[Group]:
    asking = "coprs_deploy.bench.answer_workloads:open_requests"
    batch = "coprs_deploy.bench.answer_workloads:open_batch"
    sweep = partial(_Sweep, fixtures, device)
    targets = sweep("targets", "prior and mask decoder, targets on one image", (*COUNTS, 16))
    images = sweep("images", "image encoder, images in one call")
    many_targets, many_images = ExportVariant(targets="1,4,16"), ExportVariant(images="1,2,8")
    for model in fixtures.models():
        yield targets.graphs(model, f"{PRIOR}+{MASK_DECODER}", many_targets, False)
        yield images.graphs(model, IMAGE_ENCODER, many_images, True)
    questions = sweep("questions", "questions on one image, time of one")
    yield questions.requests(asking, NUM_IMAGES, count=NUM_IMAGES, max_cached_images=1)
    yield sweep("images", "images at once, time of one").requests(batch, max(COUNTS))
    sides = sweep("side", "side of the image in pixels", SIDES, "{0} x {0} pixels")
    yield sides.requests(asking, NUM_SIDE_IMAGES, count=NUM_SIDE_IMAGES)
