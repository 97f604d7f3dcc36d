"""Each graph in each runtime and precision, beside PyTorch and segment-anything.

Half precision is also measured with every rounding of a typed graph explicit: the accuracy that a
GPU will have, computed on any CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import (
    ALL_GRAPHS,
    WIDE,
    ExportVariant,
    Fixtures,
    Model,
    matmul_precisions,
    runtime_version,
    runtimes_here,
    version_of,
)
from coprs_deploy.bench.report import Skipped
from coprs_deploy.bundle import read_manifest
from coprs_deploy.export.precision import BF16, FP16, FP32, INT8
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER

WORKLOADS = "coprs_deploy.bench.graph_workloads"

RUNTIME_BYTES, TORCH_BYTES = 100_000_000, 400_000_000
"""Memory of a process before its graph or its modules are opened."""


def plan_engines(fixtures: Fixtures) -> Planned:
    """Plan a group for each model, device and graph."""
    devices, is_quick = fixtures.options.devices, fixtures.options.is_quick
    present, skipped = runtimes_here(devices)
    yield from skipped
    graphs = (IMAGE_ENCODER, ALL_GRAPHS) if is_quick else (*GRAPH_NAMES, ALL_GRAPHS)
    for model, device, graph in itertools.product(fixtures.models(), devices, graphs):
        planned = _GroupCases(fixtures, model, graph, device)
        runtimes = [runtime for runtime, where in present if where == device]
        cases = (*planned.graph_cases(runtimes), *planned.peer_cases())
        name, baseline = f"{model.name}: {graph} on {device}", planned.torch_name("eager", FP32)
        yield Group(name, cases, baseline, "one image, one target")


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


@dataclass(frozen=True)
class _GroupCases:
    """The cases of one graph of one model on one device."""

    fixtures: Fixtures
    model: Model
    graph: str
    device: str

    def torch_name(self, mode: str, precision: str, what: str = "coprs-deploy module") -> str:
        return f"{what}, PyTorch {version_of('torch')} {mode} {self.device} {precision}"

    def _labels(self, runtime: str, precision: str, **more: object) -> dict[str, str]:
        return self.model.labels(runtime, precision, self.device, graph=self.graph, **more)

    def _inputs(self) -> dict[str, Any]:
        return {"inputs": self.fixtures.inputs(self.model)}

    def _bundle(self, runtime: str, precision: str, variant: ExportVariant) -> dict[str, Any]:
        bundle = self.fixtures.bundle(self.model, runtime, precision, variant)
        return self._inputs() | {"bundle": bundle}

    def graph_cases(self, runtimes: list[str]) -> Iterator[Case]:
        """List a case for each runtime, precision, matmul precision and variant."""
        is_quick, on_cpu = self.fixtures.options.is_quick, self.device == "cpu"
        is_short = is_quick and on_cpu and self.model.checkpoint is not None
        for runtime, precision in precisions(self.model, runtimes):
            if is_short and precision != FP32:
                continue
            forms = variants(self.model, self.graph, precision)
            matmuls = matmul_precisions(runtime, precision)
            for matmul, variant in itertools.product(matmuls, forms):
                lower, shape = matmul if matmul != FP32 else "", variant.description
                words = [f"matmul in {lower}" if lower else "", shape]
                settings = {"graph": self.graph, "device": self.device, "runtime": runtime}
                more = {"matmul_precision": lower, "aspect_ratio": shape}
                name = runtime_name(runtime, self.device, precision)
                yield Case(
                    ", ".join([name, *filter(None, words)]),
                    f"{WORKLOADS}:open_bundle_graphs",
                    settings | {"inference_precision": matmul},
                    self._labels(runtime, precision, **more),
                    partial(self._bundle, runtime, precision, variant),
                    self.model.estimated_bytes + RUNTIME_BYTES,
                )

    def peer_cases(self) -> Iterator[Case]:
        """List PyTorch for every graph; for the image encoder also segment-anything's own."""
        if self.model.checkpoint is None:
            return
        yield self._torch("eager", FP32)
        if self.graph != IMAGE_ENCODER:
            return
        is_quick, on_gpu = self.fixtures.options.is_quick, self.device == "cuda"
        modes = [("eager", BF16), ("compile", FP32)]
        modes += [("eager", FP16), ("compile", BF16)] if on_gpu else []
        for mode, precision in modes:
            yield self._torch(mode, precision)
        own = f"segment-anything {version_of('segment-anything')} ImageEncoderViT"
        for precision in (FP32,) if is_quick else (FP32, BF16):
            yield self._torch("eager", precision, own)
        exported = [("onnxruntime", FP32)]
        here = matmul_precisions("openvino", FP32)[: 1 if is_quick else None]
        exported += [] if on_gpu else [("openvino", precision) for precision in here]
        for runtime, precision in exported:
            version = f"{runtime} {runtime_version(runtime)} {self.device} {precision}"
            yield Case(
                f"{own}, torch.onnx.export, {version}",
                f"{WORKLOADS}:open_exported_{runtime}",
                {"device": self.device, "precision": precision},
                self._labels(f"segment-anything {runtime}", precision),
                self._export_segment_anything,
                self.model.estimated_bytes + RUNTIME_BYTES,
            )

    def _torch(self, mode: str, precision: str, peer: str = "") -> Case:
        return Case(
            self.torch_name(mode, precision, peer or "coprs-deploy module"),
            f"{WORKLOADS}:open_module",
            {
                "checkpoint": self.model.checkpoint,
                "graph": self.graph,
                "device": self.device,
                "precision": precision,
                "compiled": mode == "compile",
                "segment_anything": bool(peer),
            },
            self._labels("segment-anything " * bool(peer) + f"torch {mode}", precision),
            self._inputs,
            self.model.estimated_bytes + TORCH_BYTES,
        )

    def _export_segment_anything(self) -> dict[str, Any]:
        inputs = self._inputs()  # makes the checkpoint too
        names, checkpoint = (self.model.name, self.model.fingerprint), self.model.checkpoint
        made = self.fixtures.make("export_segment_anything", *names, checkpoint=checkpoint)
        return inputs | {"path": made / "encoder.onnx"}


SCENES = 128


def plan_precision(fixtures: Fixtures) -> Planned:
    """Plan a case for each precision of the requested model."""
    model, settings = fixtures.model, {"checkpoint": fixtures.model.checkpoint}
    if model.checkpoint is None:
        reason = "the graphs are made from a checkpoint; name it with --checkpoint"
        yield Skipped(model.name, reason)
        return

    def prepare(precision: str) -> dict[str, Any]:
        names = (model.name, precision, model.fingerprint)
        folder = fixtures.make("write_rounded_graphs", *names, precision=precision, **settings)
        inputs = fixtures.inputs(model, SCENES if model.has_gt else None)
        return {"folder": folder, "inputs": inputs}

    target, cases = "coprs_deploy.bench.graph_workloads:open_rounded_graphs", []
    for precision in (FP32, FP16, BF16):
        labels = model.labels(precision=precision, graph=ALL_GRAPHS)
        name, make = f"{precision}, explicit roundings", partial(prepare, precision)
        cases.append(Case(name, target, settings, labels, make))
    yield Group(f"{model.name}: half precision", tuple(cases), unit="one input", runs=0)
