"""Each graph in each runtime and precision, beside PyTorch and segment-anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

from coprs_deploy.bench.availability import (
    matmul_precisions,
    runtime_version,
    runtimes_here,
    version_of,
)
from coprs_deploy.bench.case import Case, Group, SuitePlan
from coprs_deploy.bench.fixtures import WIDE, ExportVariant, Fixtures, Model
from coprs_deploy.bench.graph_workloads import ALL_GRAPHS
from coprs_deploy.bench.suites import labels_of
from coprs_deploy.bundle import read_manifest
from coprs_deploy.export.precision import BF16, FP16, FP32, INT8
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER

NAME = "engines"
SUMMARY = "each graph in each runtime and precision, beside PyTorch and segment-anything"

RUNTIME_BYTES, TORCH_BYTES = 100_000_000, 400_000_000
"""Memory of a process before its graph or its modules are opened."""

EXPORTED_TARGETS = {
    "onnxruntime": "coprs_deploy.bench.module_workloads:open_exported_onnxruntime",
    "openvino": "coprs_deploy.bench.module_workloads:open_exported_openvino",
}


def suite_plan(fixtures: Fixtures) -> SuitePlan:
    """List a group for each model, device and graph."""
    devices, is_quick = fixtures.options.devices, fixtures.options.is_quick
    present, skipped = runtimes_here(NAME, devices)
    graphs = (IMAGE_ENCODER, ALL_GRAPHS) if is_quick else (*GRAPH_NAMES, ALL_GRAPHS)
    groups = []
    for model, device, graph in itertools.product(fixtures.models(), devices, graphs):
        planned = _GroupCases(fixtures, model, graph, device)
        runtimes = [runtime for runtime, where in present if where == device]
        cases = (*planned.graph_cases(runtimes), *planned.peer_cases())
        name, base = f"{model.name}: {graph} on {device}", planned.torch_name("eager", FP32)
        evaluate = fixtures.evaluate_graphs(model)
        groups.append(Group(NAME, name, cases, base, evaluate, "one image, one target"))
    return SuitePlan(tuple(groups), tuple(skipped))


def precisions(model: Model, runtimes: list[str]) -> list[tuple[str, str]]:
    """Pair runtimes with the precisions that a model's graphs can have, or do have."""
    if model.checkpoint is None:
        assert model.bundle is not None
        graph = read_manifest(model.bundle).graphs[IMAGE_ENCODER]
        return [(r, graph.precision) for r in runtimes if r == graph.runtime]
    return [(r, p) for r in runtimes for known, p in TOLERANCES if known == r]


def runtime_name(runtime: str, device: str, precision: str) -> str:
    """Name a case that runs this package's graphs."""
    return f"coprs-deploy graph, {runtime} {runtime_version(runtime)} {device} {precision}"


def variants(model: Model, graph: str, precision: str) -> tuple[ExportVariant, ...]:
    """List the measured variants: encoders of real size also for one aspect ratio."""
    if graph != IMAGE_ENCODER or precision not in (FP32, INT8) or not model.is_random:
        return (model.variant,)
    wide = ExportVariant(aspect_ratio=WIDE)
    return (ExportVariant(), wide, ExportVariant(aspect_ratio=WIDE, drop_padding=True))


class _GroupCases:
    """The cases of one graph of one model on one device."""

    def __init__(self, fixtures: Fixtures, model: Model, graph: str, device: str) -> None:
        self._fixtures, self._model, self._graph = fixtures, model, graph
        self._device, self._is_quick = device, fixtures.options.is_quick

    def torch_name(self, mode: str, precision: str) -> str:
        torch = f"PyTorch {version_of('torch')} {mode} {self._device} {precision}"
        return f"coprs-deploy module, {torch}"

    def _labels(self, runtime: str, precision: str, **more: object) -> dict[str, str]:
        return labels_of(self._model, runtime, precision, self._device, graph=self._graph, **more)

    def _inputs(self) -> dict[str, Any]:
        return {"inputs": self._fixtures.inputs(self._model)}

    def graph_cases(self, runtimes: list[str]) -> Iterator[Case]:
        """List a case for each runtime, precision, matmul precision and variant."""
        target = "coprs_deploy.bench.graph_workloads:open_bundle_graphs"
        settings = {"graph": self._graph, "device": self._device}
        memory = self._model.estimated_bytes + RUNTIME_BYTES
        is_short = self._is_quick and self._device == "cpu" and self._model.checkpoint is not None

        def prepare(runtime: str, precision: str, variant: ExportVariant) -> dict[str, Any]:
            bundle = self._fixtures.bundle(self._model, runtime, precision, variant)
            return self._inputs() | {"bundle": bundle}

        for runtime, precision in precisions(self._model, runtimes):
            forms = variants(self._model, self._graph, precision)
            matmuls = matmul_precisions(runtime, precision)
            for matmul, variant in itertools.product(matmuls, forms):
                lower = matmul if matmul != FP32 else ""
                words = [f"matmul in {lower}" if lower else "", variant.description]
                given = {"runtime": runtime, "inference_precision": matmul}
                more = {"matmul_precision": lower, "aspect_ratio": variant.description}
                if precision == FP32 or not is_short:
                    yield Case(
                        ", ".join(
                            [runtime_name(runtime, self._device, precision), *filter(None, words)]
                        ),
                        target,
                        settings | given,
                        self._labels(runtime, precision, **more),
                        partial(prepare, runtime, precision, variant),
                        memory,
                    )

    def peer_cases(self) -> Iterator[Case]:
        """List PyTorch for every graph; for the image encoder also segment-anything's own."""
        if self._model.checkpoint is None:
            return
        yield self._torch("eager", FP32)
        if self._graph != IMAGE_ENCODER:
            return
        on_gpu = self._device == "cuda"
        for mode, precision in (("eager", BF16), ("compile", FP32)):
            yield self._torch(mode, precision)
        for mode, precision in (("eager", FP16), ("compile", BF16)) if on_gpu else ():
            yield self._torch(mode, precision)
        own = f"segment-anything {version_of('segment-anything')} ImageEncoderViT"
        for precision in (FP32,) if self._is_quick else (FP32, BF16):
            yield self._torch("eager", precision, own)
        exported = [("onnxruntime", FP32)]
        here = matmul_precisions("openvino", FP32)[: 1 if self._is_quick else None]
        exported += [] if on_gpu else [("openvino", precision) for precision in here]
        for runtime, precision in exported:
            version = f"{runtime} {runtime_version(runtime)} {self._device} {precision}"
            yield Case(
                f"{own}, torch.onnx.export, {version}",
                EXPORTED_TARGETS[runtime],
                {"device": self._device, "precision": precision},
                self._labels(f"segment-anything {runtime}", precision),
                self._export_segment_anything,
                self._model.estimated_bytes + RUNTIME_BYTES,
            )

    def _torch(self, mode: str, precision: str, peer: str = "") -> Case:
        name, prefix = self.torch_name(mode, precision), "segment-anything " if peer else ""
        settings = {
            "checkpoint": str(self._model.checkpoint),
            "graph": self._graph,
            "device": self._device,
            "precision": precision,
            "compiled": mode == "compile",
            "segment_anything": bool(peer),
        }
        return Case(
            name.replace("coprs-deploy module", peer) if peer else name,
            "coprs_deploy.bench.module_workloads:open_module",
            settings,
            self._labels(f"{prefix}torch {mode}", precision),
            self._inputs,
            self._model.estimated_bytes + TORCH_BYTES,
        )

    def _export_segment_anything(self) -> dict[str, Any]:
        name, checkpoint = f"{self._model.name}-segment-anything", self._model.checkpoint
        made = self._fixtures.make(name, "export_segment_anything", checkpoint=checkpoint)
        return self._inputs() | {"path": str(made / "encoder.onnx")}
