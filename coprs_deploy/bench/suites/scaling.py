"""Scaling sweeps: targets and questions per image, images per call, image size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import ExportVariant, Fixtures, Model, runtimes_here
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

RUNTIME = "onnxruntime"

NUM_IMAGES, NUM_SIDE_IMAGES = 8, 4
"""Number of scenes, used in turn, and those of each size."""

MANY_TARGETS = ExportVariant(targets=OptimizationProfile(1, 4, 16))
MANY_IMAGES = ExportVariant(images=OptimizationProfile(1, 2, 8))

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

    def graphs(self, model: Model, graph: str, variant: ExportVariant, is_large: bool) -> Group:
        """Measure graphs of a bundle with a profile, on repeated inputs."""

        def prepare(value: int) -> dict[str, Any]:
            bundle = self.fixtures.bundle(model, RUNTIME, "fp32", variant)
            return {"bundle": bundle, "inputs": self.fixtures.inputs(model)}

        def case(value: int) -> tuple[dict[str, Any], int]:
            memory = value * model.estimated_bytes if is_large else 700_000_000
            return {"graph": graph, "runtime": RUNTIME, "repeat": value}, memory

        return self._group(model, "graph_workloads:open_bundle_graphs", case, prepare)

    def requests(self, function: str, num_scenes: int, **settings: Any) -> Group:
        """Measure whole requests with the model's own bundle."""
        model = self.fixtures.model

        def prepare(value: int) -> dict[str, Any]:
            side = value if self.parameter == "side" else None
            reference = self.fixtures.scene_reference(num_scenes, side)
            bundle = self.fixtures.bundle(model, RUNTIME, "fp32")
            return {"bundle": bundle, "reference": reference}

        def case(value: int) -> tuple[dict[str, Any], int]:
            return {self.parameter: value, **settings}, model.request_bytes

        return self._group(model, f"answer_workloads:{function}", case, prepare)

    def _group(
        self,
        model: Model,
        function: str,
        case: Callable[[int], tuple[dict[str, Any], int]],
        prepare: Callable[[int], dict[str, Any]],
    ) -> Group:
        cases = []
        for value in self.values:
            settings, memory = case(value)
            name, target = self.name.format(value, self.parameter), f"coprs_deploy.bench.{function}"
            labels = model.labels(RUNTIME, "fp32", self.device, **{self.parameter: value})
            make = partial(prepare, value)
            cases.append(
                Case(name, target, settings | {"device": self.device}, labels, make, memory)
            )
        on_device = "" if self.device == "cpu" else f", on {self.device}"
        name, baseline = f"{model.name}: {self.title}{on_device}", cases[0].name
        return Group(name, tuple(cases), baseline, "as the name says", self.parameter)


def plan(fixtures: Fixtures) -> Planned:
    """Plan a group for each sweep on each device."""
    present, skipped = runtimes_here(fixtures.options.devices, RUNTIME)
    yield from skipped
    for _, device in present:
        yield from _groups(fixtures, device)


def _groups(fixtures: Fixtures, device: str) -> Iterator[Group]:
    sweep = partial(_Sweep, fixtures, device)
    targets = sweep("targets", "prior and mask decoder, targets on one image", (*COUNTS, 16))
    images = sweep("images", "image encoder, images in one call")
    for model in fixtures.models():
        yield targets.graphs(model, f"{PRIOR}+{MASK_DECODER}", MANY_TARGETS, False)
        yield images.graphs(model, IMAGE_ENCODER, MANY_IMAGES, True)
    questions = sweep("questions", "questions on one image, time of one")
    yield questions.requests("open_requests", NUM_IMAGES, count=NUM_IMAGES, max_cached_images=1)
    yield sweep("images", "images at once, time of one").requests("open_batch", max(COUNTS))
    sides = sweep("side", "side of the image in pixels", SIDES, "{0} x {0} pixels")
    yield sides.requests("open_requests", NUM_SIDE_IMAGES, count=NUM_SIDE_IMAGES)
