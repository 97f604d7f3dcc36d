"""Each graph in each runtime and precision, beside PyTorch and segment-anything; exports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coprs_deploy.bench.case import Case, Group, Planned
from coprs_deploy.bench.fixtures import (
    ALL_GRAPHS,
    PREPARATION,
    PREPARE_TIMEOUT_S,
    WIDE,
    Fixtures,
    Model,
    matmul_precisions,
    missing_builders,
    runtime_version,
    runtimes_here,
    shape_words,
    version_of,
)
from coprs_deploy.bench.report import Report, Skipped
from coprs_deploy.bundle import read_manifest
from coprs_deploy.engines import ONNX_RUNTIMES
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import install_hint
from coprs_deploy.export import ExportOptions
from coprs_deploy.export.precision import BF16, FP16, FP32, INT8
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER

WORKLOADS = "coprs_deploy.bench.graph_workloads"

SEGMENT_ANYTHING = "segment-anything"

RUNTIME_BYTES, TORCH_BYTES = 100_000_000, 400_000_000
"""Memory of a process before its graph or its modules are opened."""


def engines_suite(fixtures: Fixtures) -> Planned:
    """List a group for each model, device and graph."""
    devices, is_quick = fixtures.options.devices, fixtures.options.is_quick
    present, skipped = runtimes_here(devices)
    yield from skipped
    models = fixtures.models()
    if not version_of(SEGMENT_ANYTHING) and any(model.checkpoint for model in models):
        yield Skipped(SEGMENT_ANYTHING, "it is not installed", install_hint("bench"))
    graphs = (IMAGE_ENCODER, ALL_GRAPHS) if is_quick else (*GRAPH_NAMES, ALL_GRAPHS)
    for model, device, graph in itertools.product(models, devices, graphs):
        planned = _GroupCases(fixtures, model, graph, device)
        runtimes = [runtime for runtime, where in present if where == device]
        cases = [*planned.graph_cases(runtimes), *planned.peer_cases(runtimes)]
        name, baseline = f"{model.name}: {graph} on {device}", planned.torch_name("eager", FP32)
        yield Group(name, cases, baseline, "one image, one target")


def precisions(model: Model, runtimes: list[str]) -> list[tuple[str, str]]:
    """Pair runtimes with the precisions that a model's graphs can have, or do have.

    Without a checkpoint, the graphs of its bundle are run by every runtime that reads them.
    """
    if model.checkpoint is None:
        assert model.bundle is not None
        graph = read_manifest(model.bundle).graphs[IMAGE_ENCODER]
        readers = ONNX_RUNTIMES if graph.runtime in ONNX_RUNTIMES else (graph.runtime,)
        return [(r, graph.precision) for r in runtimes if r in readers]
    return [(r, p) for r in runtimes for known, p in TOLERANCES if known == r]


def runtime_name(runtime: str, device: str, precision: str) -> str:
    """Name a case that runs this package's graphs."""
    return f"coprs-deploy graph, {runtime} {runtime_version(runtime)} {device} {precision}"


def variants(model: Model, graph: str, precision: str) -> tuple[ExportOptions, ...]:
    """List the measured variants: encoders of real size also for one aspect ratio."""
    if graph != IMAGE_ENCODER or precision not in (FP32, INT8) or not model.random_bytes:
        return (model.variant,)
    forms = [ExportOptions(), ExportOptions(aspect_ratio=WIDE, drop_padding=True)]
    if model.has_sam_encoder:  # light encoders cannot skip padding exactly
        forms.insert(1, ExportOptions(aspect_ratio=WIDE))
    return tuple(forms)


@dataclass(frozen=True)
class _GroupCases:
    """The cases of one graph of one model on one device."""

    fixtures: Fixtures
    model: Model
    graph: str
    device: str

    def torch_name(self, mode: str, precision: str, what: str = "coprs-deploy module") -> str:
        return f"{what}, PyTorch {version_of('torch')} {mode} {self.device} {precision}"

    def _case(
        self, name: str, function: str, kind: tuple[str, str], settings: Any, **more: object
    ) -> Case:
        """Describe a case of a kind: runtime and precision; ``more`` are labels."""
        inputs = partial(self.fixtures.inputs, self.model)
        labels = self.model.labels(*kind, self.device, graph=self.graph, **more)
        library = TORCH_BYTES if function == "open_module" else RUNTIME_BYTES
        memory, target = self.model.estimated_bytes + library, f"{WORKLOADS}:{function}"
        shared = {"device": self.device, "inputs": inputs}
        return Case(name, target, shared | settings, labels, memory)

    def graph_cases(self, runtimes: list[str]) -> Iterator[Case]:
        """List a case for each runtime, precision, matmul precision and variant."""
        is_quick, on_cpu = self.fixtures.options.is_quick, self.device == "cpu"
        is_short = is_quick and on_cpu and self.model.checkpoint is not None
        for kind in precisions(self.model, runtimes):
            if is_short and kind[1] != FP32:
                continue
            forms = variants(self.model, self.graph, kind[1])
            for matmul, variant in itertools.product(matmul_precisions(*kind), forms):
                lower, shape = matmul if matmul != FP32 else "", shape_words(variant)
                words = [runtime_name(kind[0], self.device, kind[1])]
                words += [f"matmul in {lower}"] * bool(lower) + [shape] * bool(shape)
                bundle = partial(self.fixtures.bundle, self.model, *kind, variant)
                settings = {"bundle": bundle, "graph": self.graph, "runtime": kind[0]}
                settings["inference_precision"] = matmul
                labels = {"matmul_precision": lower, "aspect_ratio": shape}
                yield self._case(", ".join(words), "open_bundle_graphs", kind, settings, **labels)

    def peer_cases(self, runtimes: list[str]) -> Iterator[Case]:
        """List PyTorch for every graph; for the image encoder also segment-anything's own.

        segment-anything's is exported for those of ``runtimes``, which are installed.
        """
        if self.model.checkpoint is None:
            return
        yield self._torch("eager", FP32)
        if self.graph != IMAGE_ENCODER:
            return
        is_quick, on_gpu = self.fixtures.options.is_quick, self.device == "cuda"
        modes = [("eager", BF16), ("compile", FP32)]
        for mode, precision in modes + [("eager", FP16), ("compile", BF16)] * on_gpu:
            yield self._torch(mode, precision)
        if not version_of(SEGMENT_ANYTHING) or not self.model.has_sam_encoder:
            return
        own = f"{SEGMENT_ANYTHING} {version_of(SEGMENT_ANYTHING)} ImageEncoderViT"
        for precision in (FP32,) if is_quick else (FP32, BF16):
            yield self._torch("eager", precision, own)
        here = matmul_precisions("openvino", FP32)[: 1 if is_quick else None]
        exported = [("onnxruntime", FP32)]
        for runtime, precision in exported + [("openvino", p) for p in here] * (not on_gpu):
            if runtime not in runtimes:
                continue
            version = f"{runtime} {runtime_version(runtime)} {self.device} {precision}"
            name = f"{own}, torch.onnx.export, {version}"
            settings = {"precision": precision, "path": self._export_segment_anything}
            kind = (f"{SEGMENT_ANYTHING} {runtime}", precision)
            yield self._case(name, f"open_exported_{runtime}", kind, settings)

    def _torch(self, mode: str, precision: str, peer: str = "") -> Case:
        settings = {"checkpoint": partial(self.fixtures.weights, self.model), "graph": self.graph}
        settings |= {"precision": precision, "compiled": mode == "compile"}
        settings["segment_anything"] = bool(peer)
        name = self.torch_name(mode, precision, peer or "coprs-deploy module")
        kind = (f"{SEGMENT_ANYTHING} " * bool(peer) + f"torch {mode}", precision)
        return self._case(name, "open_module", kind, settings)

    def _export_segment_anything(self) -> Path:
        checkpoint = self.fixtures.weights(self.model)
        names = (self.model.name, self.model.fingerprint)
        made = self.fixtures.make("export_segment_anything", *names, checkpoint=checkpoint)
        return made / "encoder.onnx"


SCENES = 128


def precision_suite(fixtures: Fixtures) -> Planned:
    """List a case for each precision, every rounding explicit, as a GPU will round."""
    model, cases = fixtures.model, []
    inputs = partial(fixtures.inputs, model, SCENES if model.has_gt else None)
    for precision in (FP32, FP16, BF16):
        made = {"checkpoint": model.checkpoint, "precision": precision}
        names = (model.name, precision, model.fingerprint)
        folder = partial(fixtures.make, "write_rounded_graphs", *names, **made)
        settings = {"checkpoint": model.checkpoint, "folder": folder, "inputs": inputs}
        labels = model.labels(precision=precision, graph=ALL_GRAPHS)
        name, target = f"{precision}, explicit roundings", f"{WORKLOADS}:open_rounded_graphs"
        cases.append(Case(name, target, settings, labels))
    yield Group(f"{model.name}: half precision", cases, unit="one input", runs=0)


FUNCTION = "coprs_deploy.bench.worker:FunctionWorkload"
COMPUTE_CAPABILITIES = ("sm_80", "sm_89", "sm_120")
"""GPUs that engines are built for where the build needs none."""

ALONE = 1 << 60  # estimated memory of a case that is open alone


def export_suite(fixtures: Fixtures) -> Planned:
    """List a conversion of SAM's real sizes, and an export for each runtime and precision."""
    skipped = missing_builders(fixtures.options.devices)
    yield from skipped
    missing = {entry.name for entry in skipped}
    for model in fixtures.models():
        kinds = [kind for kind in TOLERANCES if kind[0] not in missing]
        is_sam = model.random_bytes and model.has_sam_encoder
        cases = [_conversion(fixtures, model)] if is_sam else []
        cases += [_export(fixtures, model, *kind) for kind in kinds]
        name, limit = f"{model.name}: export", PREPARE_TIMEOUT_S
        yield Group(name, cases, unit="one export", runs=1, timeout_s=limit)


def _conversion(fixtures: Fixtures, model: Model) -> Case:
    def sam() -> Path:
        checkpoint, name = fixtures.weights(model), f"sam_{model.name}.pth"
        return fixtures.make("write_sam_weights", name, checkpoint=checkpoint)

    settings = {"function": f"{PREPARATION}:convert", "out": fixtures.folder / "converted"}
    settings |= {"sam": sam, "checkpoint": partial(fixtures.weights, model)}
    name = "convert, policy and sam_vit file"
    return Case(name, FUNCTION, settings, model.labels("convert"), ALONE)


def _export(fixtures: Fixtures, model: Model, runtime: str, precision: str) -> Case:
    without_gpu = runtime in TRT_VARIANTS and TRT_VARIANTS[runtime].builds_without_gpu
    gpus = COMPUTE_CAPABILITIES if without_gpu else ()
    name = f"export, {runtime} {runtime_version(runtime)} {precision}"
    name += f" for {', '.join(gpus)}" if gpus else ""

    def options() -> ExportOptions:
        made = fixtures.export_options(model, runtime, precision)
        return replace(made, compute_capabilities=gpus)

    settings = {"function": f"{PREPARATION}:export_bundle", "out": fixtures.folder / "exported"}
    settings |= {"options": options, "checkpoint": partial(fixtures.weights, model)}
    return Case(name, FUNCTION, settings, model.labels(runtime, precision), ALONE)


LIMITS = {
    "convert": {"peak_over_weights": 2.0},
    "onnxruntime": {"export_s": 180, "export_peak_over_weights": 1.5, "peak_over_weights": 3.0},
}
"""Limits of ViT-H in float32 on two cores: seconds, and peak memory in multiples of the weights. A
smaller size pays the fixed cost of the libraries (about 0.5 GB) against smaller weights."""


def limit_violations(report: Report) -> list[str]:
    """List the limits that the cases of ViT-H exceed; empty when all are kept."""
    cases = [case for group in report.groups if group.suite == "export" for case in group.cases]
    return [
        f"vit_h, {case.name}: {metric} is {case.metrics[metric]:.2f}, the limit is {limit:g}"
        for case in cases
        if case.labels["model"] == "vit_h" and case.labels.get("precision", "fp32") == "fp32"
        for metric, limit in LIMITS.get(case.labels["runtime"], {}).items()
        if case.metrics.get(metric, 0) > limit
    ]
