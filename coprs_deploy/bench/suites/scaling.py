"""Scaling sweeps: targets and questions per image, images per call, image size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import ExportVariant, Fixtures, Model, runtimes_here
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

RUNTIME = "onnxruntime"

NUM_IMAGES, NUM_SIDE_IMAGES = 8, 4
"""Number of scenes, used in turn, and those of each size."""

COUNTS, SIDES = (1, 2, 4, 8), (128, 512, 1024, 2048, 4096)

Prepare = Callable[[int], dict[str, Any]]
"""Returns the settings of a case, given the value of its parameter."""


def plan(fixtures: Fixtures) -> Planned:
    """Plan a group for each sweep on each device."""
    present, skipped = runtimes_here(fixtures.options.devices, RUNTIME)
    yield from skipped
    for _, device in present:
        for model in fixtures.models():
            sweep = partial(_sweep, model, device, "graph_workloads:open_bundle_graphs")
            variant = ExportVariant(targets=OptimizationProfile(1, 4, 16))
            prepare = _graphs(fixtures, model, f"{PRIOR}+{MASK_DECODER}", variant)
            title, values = "prior and mask decoder, targets on one image", (*COUNTS, 16)
            yield sweep("targets", title, prepare=prepare, memory=[700_000_000] * 5, values=values)
            variant = ExportVariant(images=OptimizationProfile(1, 2, 8))
            prepare = _graphs(fixtures, model, IMAGE_ENCODER, variant)
            memory = [value * model.estimated_bytes for value in COUNTS]
            yield sweep(
                "images", "image encoder, images in one call", prepare=prepare, memory=memory
            )
        sweep = partial(_sweep, fixtures.model, device)
        requests, batch = "answer_workloads:open_requests", "answer_workloads:open_batch"
        memory = [fixtures.model.request_bytes] * len(SIDES)
        prepare = _requests(fixtures, "questions", NUM_IMAGES, count=NUM_IMAGES, cached=1)
        title = "questions on one image, time of one"
        yield sweep(requests, "questions", title, prepare=prepare, memory=memory)
        prepare = _requests(fixtures, "images", max(COUNTS))
        yield sweep(batch, "images", "images at once, time of one", prepare=prepare, memory=memory)
        prepare = _requests(fixtures, "side", NUM_SIDE_IMAGES, count=NUM_SIDE_IMAGES)
        yield sweep(
            requests,
            "side",
            "side of the image in pixels",
            prepare=prepare,
            memory=memory,
            values=SIDES,
        )


def _graphs(fixtures: Fixtures, model: Model, graph: str, variant: ExportVariant) -> Prepare:
    """Measure graphs of a bundle with a profile, on repeated inputs."""

    def prepare(value: int) -> dict[str, Any]:
        bundle, inputs = fixtures.bundle(model, RUNTIME, "fp32", variant), fixtures.inputs(model)
        settings = {"bundle": bundle, "inputs": inputs, "graph": graph}
        return {**settings, "runtime": RUNTIME, "repeat": value}

    return prepare


def _requests(fixtures: Fixtures, parameter: str, num_scenes: int, **settings: Any) -> Prepare:
    """Measure whole requests with the model's own bundle."""

    def prepare(value: int) -> dict[str, Any]:
        reference = fixtures.scene_reference(num_scenes, value if parameter == "side" else None)
        bundle = fixtures.bundle(fixtures.model, RUNTIME, "fp32")
        return {"bundle": bundle, "reference": reference, parameter: value, **settings}

    return prepare


def _sweep(
    model: Model,
    device: str,
    function: str,
    parameter: str,
    title: str,
    *,
    prepare: Prepare,
    memory: Sequence[int],
    values: Sequence[int] = COUNTS,
) -> Group:
    cases = []
    for value, size in zip(values, memory, strict=False):
        name = f"{value} x {value} pixels" if parameter == "side" else f"{value} {parameter}"
        labels = model.labels(RUNTIME, "fp32", device, **{parameter: value})
        target, settings = f"coprs_deploy.bench.{function}", {"device": device}
        cases.append(Case(name, target, settings, labels, partial(prepare, value), size))
    on_device = "" if device == "cpu" else f", on {device}"
    name = f"{model.name}: {title}{on_device}"
    return Group(name, tuple(cases), cases[0].name, "as the name says", parameter)
