"""Each graph with each runtime and precision that is here, beside what people would use instead."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from coprs_deploy.benchmarks.case import Case, Group, Plan
from coprs_deploy.benchmarks.form import ANY_PICTURE, WIDE, Form
from coprs_deploy.benchmarks.graph_subjects import CHAIN
from coprs_deploy.benchmarks.process import WorkerError, call_once
from coprs_deploy.benchmarks.report import LeftOut, Work
from coprs_deploy.benchmarks.workshop import PREPARE_SECONDS, Model, Workshop, version_of
from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines import openvino_runner
from coprs_deploy.export.precision import FP32, INT8
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER

NAME = "engines"
SUMMARY = "each graph with each runtime and precision, beside PyTorch and segment-anything"

GRAPHS = "coprs_deploy.benchmarks.graph_subjects"
TORCH = "coprs_deploy.benchmarks.torch_subjects"

RUNTIME_BYTES, TORCH_BYTES = 100_000_000, 400_000_000
"""Memory of a process before its graph or its modules are opened."""

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""What one weight takes by precision."""

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
"""Packages that a runtime may come from."""


def plan(workshop: Workshop) -> Plan:
    """Export for every runtime and precision, and plan a row for each graph and each peer."""
    groups: list[Group] = []
    present, left_out = workshop.runtimes(NAME)
    for model in workshop.models():
        try:
            inputs = workshop.inputs(model)
        except WorkerError as error:
            left_out.append(LeftOut(NAME, model.name, f"inputs could not be made: {error}"))
            continue
        for device in workshop.devices:
            for graph in (IMAGE_ENCODER, CHAIN) if workshop.is_quick else (*GRAPH_NAMES, CHAIN):
                group = group_name(model, graph, device)
                here = [runtime for runtime, where in present if where == device]
                cases = [
                    *_graph_cases(workshop, model, here, graph=graph, inputs=inputs, device=device),
                    *_peers(workshop, model, graph, inputs, device),
                ]
                cases = [case for case in cases if workshop.wants(group, case.name)]
                if not cases:
                    continue
                base = _torch_name(device, "eager", "fp32")
                groups.append(
                    Group(
                        suite=NAME,
                        name=group,
                        cases=tuple(cases),
                        baseline=base if any(c.name == base for c in cases) else cases[0].name,
                        judge=workshop.judge(model, inputs),
                        unit="one image, one target",
                    )
                )
    return Plan(tuple(groups), tuple(left_out))


def group_name(model: Model, graph: str, device: str) -> str:
    """Name the rows of one graph on one device."""
    return f"{model.name}: {graph} on {device}"


def precisions(model: Model, runtimes: list[str]) -> list[tuple[str, str]]:
    """Pair runtimes with the precisions that a model's graphs can have, or do have."""
    if model.checkpoint is None:
        assert model.bundle is not None
        graph = read_manifest(model.bundle).graphs[IMAGE_ENCODER]
        return [(r, graph.precision) for r in runtimes if r == graph.runtime]
    return [(r, p) for r in runtimes for known, p in TOLERANCES if known == r]


def products(runtime: str, precision: str) -> tuple[str, ...]:
    """Say in what the float32 products of such a graph can be computed here."""
    if runtime != "openvino" or precision not in (FP32, INT8):
        return (FP32,)
    return openvino_runner.inference_precisions()


def runtime_name(runtime: str, device: str, precision: str) -> str:
    """Name a row that runs this package's graphs."""
    version = version_of(*DISTRIBUTIONS.get(runtime, (runtime,)))
    return f"coprs-deploy graph, {runtime} {version} {device} {precision}"


def _torch_name(device: str, how: str, precision: str) -> str:
    return f"coprs-deploy module, PyTorch {version_of('torch')} {how} {device} {precision}"


def _labels(model: Model, graph: str, runtime: str, precision: str, device: str) -> dict[str, str]:
    return {
        "model": model.name,
        "graph": graph,
        "runtime": runtime,
        "precision": precision,
        "device": device,
    }


def _graph_cases(
    workshop: Workshop, model: Model, runtimes: list[str], *, graph: str, inputs: str, device: str
) -> Iterable[Case]:
    """Export for each runtime and precision that was asked for."""
    group = group_name(model, graph, device)
    for runtime, precision in precisions(model, runtimes):
        if workshop.is_quick and device == "cpu" and model.checkpoint and precision != FP32:
            continue
        for product, form in itertools.product(
            products(runtime, precision), forms(model, graph, precision)
        ):
            name = runtime_name(runtime, device, precision)
            name += f", products in {product}" if product != FP32 else ""
            name += f", {form.pictures}" if form.pictures else ""
            if not workshop.wants(group, name):
                continue
            bundle = workshop.bundle(model, runtime, precision, form)
            yield Case(
                name=name,
                target=f"{GRAPHS}:open_bundle_subject",
                settings={
                    "bundle": str(bundle.path),
                    "runtime": runtime,
                    "graph": graph,
                    "inputs": inputs,
                    "device": device,
                    "inference_precision": product,
                },
                labels=_labels(model, graph, runtime, precision, device)
                | ({"products": product} if product != FP32 else {})
                | ({"pictures": form.pictures} if form.pictures else {}),
                estimated_bytes=model.estimated_bytes + RUNTIME_BYTES,
                problem=f"it could not be exported: {bundle.problem}" if bundle.problem else "",
                work=graph_work(
                    workshop, model, graph, precision if product == FP32 else product, form
                ),
            )


def forms(model: Model, graph: str, precision: str) -> tuple[Form, ...]:
    """Say in which forms a graph is measured: an encoder of real size also for one aspect."""
    if graph != IMAGE_ENCODER or precision not in (FP32, INT8) or not model.is_random:
        return (model.form,)
    return (ANY_PICTURE, Form(aspect_ratio=WIDE), Form(aspect_ratio=WIDE, drop_padding=True))


def graph_work(
    workshop: Workshop, model: Model, graph: str, precision: str, form: Form | None = None
) -> Work | None:
    """Count a graph of the float32 bundle.

    A typed or compiled one does the same operations, and reads its weights in its own precision.
    """
    bundle = workshop.bundle(model, "onnxruntime", "fp32", form)
    if bundle.problem:
        return None
    names = GRAPH_NAMES if graph == CHAIN else (graph,)
    counted = [workshop.work(bundle.path / f"{name}.onnx") for name in names]
    known = [work for work in counted if work is not None]
    if len(known) < len(names):
        return None
    moved = sum(w.tensor_bytes + w.weight_bytes * WEIGHT_BYTES[precision] // 4 for w in known)
    return Work(sum(work.flops for work in known), moved)


def _peers(
    workshop: Workshop, model: Model, graph: str, inputs: str, device: str
) -> Iterable[Case]:
    """PyTorch for every graph; for the image encoder also the ways people run SAM."""
    if model.checkpoint is None:
        return
    checkpoint = str(model.checkpoint)
    ways = [("eager", "fp32")]
    if graph == IMAGE_ENCODER:
        ways += [("eager", "bf16"), ("compile", "fp32")]
        if device == "cuda":
            ways += [("eager", "fp16"), ("compile", "bf16")]
    for how, precision in ways:
        yield Case(
            name=_torch_name(device, how, precision),
            target=f"{TORCH}:open_module",
            settings={
                "checkpoint": checkpoint,
                "graph": graph,
                "inputs": inputs,
                "precision": precision,
                "device": device,
                "compiled": how == "compile",
            },
            labels=_labels(model, graph, f"torch {how}", precision, device),
            estimated_bytes=model.estimated_bytes + TORCH_BYTES,
            work=graph_work(workshop, model, graph, precision),
        )
    if graph != IMAGE_ENCODER:
        return
    name = f"segment-anything {version_of('segment-anything')} ImageEncoderViT"
    missing = (
        ""
        if version_of("segment-anything")
        else 'it is not installed; pip install "coprs-deploy[bench]"'
    )
    for precision in ("fp32",) if workshop.is_quick else ("fp32", "bf16"):
        yield Case(
            name=f"{name}, PyTorch {version_of('torch')} eager {device} {precision}",
            target=f"{TORCH}:open_segment_anything",
            settings={
                "checkpoint": checkpoint,
                "inputs": inputs,
                "precision": precision,
                "device": device,
            },
            labels=_labels(model, graph, "segment-anything torch eager", precision, device),
            estimated_bytes=model.estimated_bytes + TORCH_BYTES,
            problem=missing,
            work=graph_work(workshop, model, graph, precision),
        )
    yield from _exported_peers(
        workshop, model, inputs=inputs, device=device, name=name, missing=missing
    )


def _exported_peers(
    workshop: Workshop, model: Model, *, inputs: str, device: str, name: str, missing: str
) -> Iterable[Case]:
    """Run segment-anything's encoder, exported as it is, in the default session of each runtime."""
    here = [("onnxruntime", FP32)]
    if device == "cpu":
        in_openvino = products("openvino", FP32) if version_of("openvino") else (FP32,)
        here += [("openvino", precision) for precision in in_openvino]
    path = workshop.folder / f"{model.name}-segment-anything" / "encoder.onnx"
    for runtime, precision in here:
        if workshop.is_quick and precision != FP32:
            continue
        version = version_of(*DISTRIBUTIONS[runtime])
        title = f"{name}, torch.onnx.export, {runtime} {version} {device} {precision}"
        problem = missing if version else f"it is not installed; pip install {runtime}"
        if (
            not problem
            and not path.exists()
            and workshop.wants(group_name(model, IMAGE_ENCODER, device), title)
        ):
            workshop.progress(f"{model.name}: export segment-anything's encoder")
            try:
                call_once(
                    f"{TORCH}:export_segment_anything",
                    PREPARE_SECONDS,
                    checkpoint=str(model.checkpoint),
                    out=str(path),
                )
            except WorkerError as error:
                problem = f"it could not be exported: {error}"
        settings = {"path": str(path), "inputs": inputs}
        more = {"device": device} if runtime == "onnxruntime" else {"precision": precision}
        yield Case(
            name=title,
            target=f"{TORCH}:open_exported_{runtime}",
            settings=settings | more,
            labels=_labels(model, IMAGE_ENCODER, f"segment-anything {runtime}", precision, device),
            estimated_bytes=model.estimated_bytes + RUNTIME_BYTES,
            problem=problem,
            work=graph_work(workshop, model, IMAGE_ENCODER, precision),
        )
