"""Fixtures: what runs here; checkpoints, bundles, inputs and float32 references, each made once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from coprs_deploy import demo
from coprs_deploy.bench.accuracy import GraphReference, SceneReference
from coprs_deploy.bench.case import BenchOptions, Progress
from coprs_deploy.bench.report import Skipped
from coprs_deploy.bench.worker import WorkerError, call_once
from coprs_deploy.bundle import TRT_VARIANT_NAMES, Bundle, Manifest, open_bundle, read_manifest
from coprs_deploy.checkpoint import SEGMENTATION_FILE, read_checkpoint
from coprs_deploy.data.synthetic.presets import PLAIN, PRESETS
from coprs_deploy.engines import openvino_runner, runtime_module, runtime_names
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import BundleError, MissingDependencyError
from coprs_deploy.export import ExportOptions
from coprs_deploy.export.precision import FP32, INT8
from coprs_deploy.machine import installed_versions
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR


def version_of(*packages: str) -> str:
    """Return the version of the first of these packages that is installed; empty without one."""
    versions = installed_versions(packages)
    return next((versions[package] for package in packages if package in versions), "")


def runtime_version(runtime: str) -> str:
    """Return the version of a runtime's package; empty where it is not installed."""
    return version_of(*["onnxruntime-gpu"] * (runtime == "onnxruntime"), runtime)


def gpu_name() -> str | None:
    """Name the GPU and its compute capability; None without a GPU."""
    gpu = current_gpu()
    return f"{gpu.name} ({gpu.compute_capability})" if gpu else None


def runtimes_here(
    devices: tuple[str, ...], runtime: str = ""
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """List runtimes that can run graphs here, each with a device, and those that are skipped."""
    present, skipped = [], []
    for name in [runtime] if runtime else runtime_names():
        for entry in runtime_module(name).availability():
            default = "cuda" if name in TRT_VARIANT_NAMES else "cpu"
            device = entry.name.partition(" ")[2] or default
            if not entry.is_available:
                skipped.append(Skipped(entry.name, entry.detail, entry.remedy))
            elif device in devices:
                present.append((name, device))
            else:
                skipped.append(Skipped(entry.name, "the device is not in --device"))
    return present, skipped


def matmul_precisions(runtime: str, precision: str) -> tuple[str, ...]:
    """List the precisions in which a runtime can compute a graph's float32 products here."""
    if runtime != "openvino" or precision not in (FP32, INT8) or not version_of("openvino"):
        return (FP32,)
    return openvino_runner.inference_precisions()


def missing_builders(devices: tuple[str, ...]) -> list[Skipped]:
    """List the TensorRT variants that cannot build engines here."""
    skipped = []
    for name in TRT_VARIANT_NAMES:
        try:
            TRT_VARIANTS[name].load()
            if not TRT_VARIANTS[name].builds_without_gpu and "cuda" not in devices:
                reason = "engines are built on the GPU that runs them, and there is none"
                skipped.append(Skipped(name, reason))
        except MissingDependencyError as error:
            skipped.append(Skipped(name, str(error)))
    return skipped


RANDOM_MODELS = {
    "tiny": (3, 1),
    "vit_b": (2, 375),
    "vit_l": (1, 1250),
    "vit_h": (1, 2564),
    "tinyvit_5m": (2, 39),
    "efficientvit_l0": (2, 139),
    "efficientvit_l1": (2, 191),
    "efficientvit_l2": (2, 245),
    "efficientvit_xl0": (2, 468),
    "efficientvit_xl1": (2, 813),
    "nanosam_resnet18": (2, 79),
}
"""Number of inputs, as PyTorch's reference of a large encoder takes long, and megabytes."""

CALIBRATION_IMAGES, FEW_CALIBRATION_IMAGES = 32, 4
"""For the int8 of trained weights, and of random ones, whose speed does not depend on them."""

PREPARATION = "coprs_deploy.bench.preparation"
PREPARE_TIMEOUT_S = 1800.0

WIDE = (16, 9)
"""Aspect ratio of most cameras, which encoders of real size are measured for too."""

ALL_GRAPHS = "all three graphs"
"""Stands for the name of a graph where all of them run, one after the other."""


def variant_of(manifest: Manifest) -> ExportOptions:
    """Return the options that make the graphs of a bundle static, and fit them to images."""
    encoder, prior = manifest.graphs[IMAGE_ENCODER].spec, manifest.graphs[PRIOR].spec
    return ExportOptions(
        targets=prior.targets,
        images=encoder.images,
        aspect_ratio=encoder.valid_region.aspect_ratio if encoder.valid_region else None,
        drop_padding=encoder.drops_padding,
    )


def shape_words(variant: ExportOptions) -> str:
    """Describe a fixed aspect ratio; empty for any."""
    if variant.aspect_ratio is None:
        return ""
    return "for {}:{}".format(*variant.aspect_ratio) + " without padding" * variant.drop_padding


def variant_words(variant: ExportOptions) -> list[str]:
    """Return the words that name the files of a variant."""
    return [f"{variant.targets.max}x{variant.images.max}", *shape_words(variant).split()]


@dataclass(frozen=True)
class Model:
    """What is measured: the demo model, a user's bundle, or a SAM size with random weights.

    Attributes:
        num_inputs: number of inputs for accuracy.
        has_gt: whether its masks of held-out scenes mean something.
        preset: difficulty preset of the scenes.
        random_bytes: size of random weights, which need not exist yet; 0 for other models.
        variant: variant of its bundle.
    """

    name: str
    checkpoint: Path | None
    bundle: Path | None
    num_inputs: int = 3
    has_gt: bool = False
    preset: str = PLAIN.name
    random_bytes: int = 0
    variant: ExportOptions = field(default_factory=ExportOptions)

    @property
    def has_sam_encoder(self) -> bool:
        """Whether its image encoder is SAM's own, which segment-anything can run too."""
        if self.random_bytes:
            return SAM_SIZES[self.name].image_encoder is None
        if self.checkpoint is None:
            return False
        return read_checkpoint(self.checkpoint).config.model.sam.image_encoder is None

    @property
    def weights_bytes(self) -> int:
        """Size of the segmentation weights; 0 where they are unknown."""
        if self.checkpoint is None or self.random_bytes:
            return self.random_bytes
        return (self.checkpoint / SEGMENTATION_FILE).stat().st_size

    @property
    def estimated_bytes(self) -> int:
        """Memory of a process with its largest graph, libraries excluded.

        A ViT-B of 375 MB peaks near 2 GB, a ViT-H of 2.5 GB near 7 GB.
        """
        stored = self.weights_bytes
        return 100_000_000 + (1_000_000_000 + 5 * stored // 2 if stored > 50_000_000 else 0)

    @property
    def request_bytes(self) -> int:
        """Memory of a process with libraries, graphs and policy."""
        assert self.bundle is not None
        bundle = Bundle(self.bundle, read_manifest(self.bundle))
        has_weights = bundle.manifest.policy.path is not None
        policy = bundle.policy_path if has_weights else bundle.policy_graphs_path
        files = policy.rglob("*")
        return 600_000_000 + self.estimated_bytes + 6 * sum(f.stat().st_size for f in files) // 5

    @cached_property
    def fingerprint(self) -> str:
        """First digits of the fingerprint of its weights; random ones are always the same."""
        if self.random_bytes:
            return "random"
        if self.checkpoint is not None:
            return read_checkpoint(self.checkpoint).fingerprint()[:12]
        assert self.bundle is not None
        return read_manifest(self.bundle).checkpoint_fingerprint[:12]

    def labels(
        self, runtime: str = "", precision: str = "", device: str = "", /, **more: object
    ) -> dict[str, str]:
        """Return the labels of a case; without the empty ones."""
        named = {"runtime": runtime, "precision": precision, "device": device, **more}
        return {"model": self.name} | {name: str(value) for name, value in named.items() if value}


def open_model(bundle: Path | None, checkpoint: Path | None) -> Model:
    """Describe the demo model, or a user's bundle, whose files are checked.

    A checkpoint that was trained on generated scenes is compared with the ground truth of held-out
    ones.

    Raises:
        BundleError: the bundle is not usable.
        ValueError: it was exported from another checkpoint.
    """
    if bundle is None:
        return Model("demo", demo.CHECKPOINT, demo.BUNDLE, num_inputs=16, has_gt=True)
    manifest = open_bundle(bundle).manifest
    if checkpoint is not None:
        found = read_checkpoint(checkpoint).fingerprint()
        if found != manifest.checkpoint_fingerprint:
            raise ValueError(
                f"--checkpoint {checkpoint} ({found[:12]}) is not what {bundle} was exported from "
                f"({manifest.checkpoint_fingerprint[:12]}); name that one, or leave it out"
            )
    described = Model(bundle.resolve().name, checkpoint, bundle, variant=variant_of(manifest))
    preset = _trained_preset(checkpoint)
    return replace(described, has_gt=True, preset=preset) if preset else described


def _trained_preset(checkpoint: Path | None) -> str | None:
    """Return the preset of the scenes that a checkpoint was trained on."""
    if checkpoint is None:
        return None
    data = read_checkpoint(checkpoint).config.provenance.get("data")
    preset = data.get("preset") if isinstance(data, dict) else None
    return preset if preset in PRESETS else None


class Fixtures:
    """Fixtures of one benchmark run, in a folder; what an earlier run left there is used again."""

    def __init__(self, folder: Path, options: BenchOptions, progress: Progress) -> None:
        self.folder, self.options, self.progress = folder, options, progress
        self.model = open_model(options.bundle, options.checkpoint)
        self._errors: dict[Path, WorkerError] = {}
        self._pending: dict[str, float] | None = None

    def models(self) -> list[Model]:
        """Return the sizes with random weights, or else the requested model."""
        models = []
        for size in self.options.sizes:
            count, megabytes = RANDOM_MODELS[size]
            checkpoint = self.folder / f"random-checkpoint-{size}"
            models.append(Model(size, checkpoint, None, count, random_bytes=megabytes * 10**6))
        return models or [self.model]

    def make(self, function: str, *names: object, **settings: Any) -> Path:
        """Make a file or folder by a function of :mod:`coprs_deploy.bench.preparation`, once.

        The function runs in a process of its own; what an earlier run made under the same names is
        taken as it is.

        Raises:
            WorkerError: it failed, now or when it was first called in this run.
        """
        name = " ".join([function.replace("_", " "), *map(str, names)])
        out = self.folder / re.sub(r"[^\w.]+", "-", name)
        if self._pending is not None and not out.exists():
            self._pending[name] = self._estimated_seconds(names)
        elif not out.exists() and out not in self._errors:
            self.progress(name)
            target, unfinished = f"{PREPARATION}:{function}", self.folder / f"unfinished-{out.name}"
            try:
                call_once(target, PREPARE_TIMEOUT_S, out=unfinished, **settings)
                unfinished.rename(out)
            except WorkerError as error:
                self._errors[out] = error
        if out in self._errors:
            raise self._errors[out]
        return out

    def _estimated_seconds(self, names: Sequence[object]) -> float:
        """Estimate a step for the model that its first name names, on two idle cores."""
        models = {model.name: model for model in (self.model, *self.models())}
        model = models.get(str(names[0]))
        return 1 if model is None else 10 + model.weights_bytes / 10**7

    def pending(self, prepare: Callable[[], object]) -> dict[str, float]:
        """Return what a preparation would make, and the seconds that each step takes roughly."""
        self._pending = {}
        try:
            prepare()
            return self._pending
        finally:
            self._pending = None

    def weights(self, model: Model) -> Path:
        """Return the checkpoint of a model, made if it is a random one.

        Raises:
            WorkerError: it has none, or making it failed.
        """
        if model.checkpoint is None:
            raise WorkerError("the bundle has no such graphs; name its checkpoint: --checkpoint")
        if not model.random_bytes:
            return model.checkpoint
        return self.make("random_checkpoint", model.name, sam=model.name)

    def bundle(
        self, model: Model, runtime: str, precision: str, variant: ExportOptions | None = None
    ) -> Path:
        """Return a bundle for a runtime: the model's own, an earlier export or a new one.

        Runtimes that read ONNX files share a bundle; without a variant it is the model's own.

        Raises:
            WorkerError: the export failed.
        """
        variant, is_engine = variant or model.variant, runtime in TRT_VARIANT_NAMES
        alike = [runtime] if is_engine else ["onnxruntime", "openvino"]
        if model.bundle is not None and variant == model.variant:
            graph = read_manifest(model.bundle).graphs[IMAGE_ENCODER]
            if graph.runtime in alike and graph.precision == precision:
                return model.bundle
        names = [model.name, runtime if is_engine else "onnx", precision, *variant_words(variant)]
        if is_engine and (gpu := current_gpu()) is not None:
            names += [runtime_version(runtime), gpu.compute_capability]
        options = self.export_options(model, runtime, precision, variant)
        names.append(model.fingerprint)
        made = self.make("export_bundle", *names, checkpoint=self.weights(model), options=options)
        try:
            return made if self._pending is not None else open_bundle(made).path
        except BundleError as error:  # a kept one was changed, or is of another version
            raise WorkerError(str(error)) from None

    def export_options(
        self, model: Model, runtime: str, precision: str, variant: ExportOptions | None = None
    ) -> ExportOptions:
        """Complete the options of an export, whose policy is a reference."""
        variant = variant or ExportOptions()
        images = self._calibration(model, variant) if precision == INT8 else None
        fixed = replace(variant, external_policy=True, overwrite=True)
        return replace(fixed, runtime=runtime, precision=precision, calibration_images=images)

    def _calibration(self, model: Model, variant: ExportOptions) -> Path:
        """Return a folder of images for int8: the user's, or scenes cut to an aspect ratio."""
        if self.options.calibration is not None:
            return self.options.calibration
        if not (model.has_gt or model.random_bytes):
            raise WorkerError("int8 is calibrated on images; name a folder with --calibration")
        count = CALIBRATION_IMAGES if model.has_gt else FEW_CALIBRATION_IMAGES
        settings = {"count": count, "aspect_ratio": variant.aspect_ratio or (1, 1)}
        return self.make("draw_images", *settings.values(), **settings)

    def inputs(self, model: Model, count: int | None = None) -> GraphReference:
        """Return a model's inputs and their float32 outputs."""
        source = {"checkpoint": model.checkpoint and self.weights(model), "bundle": model.bundle}
        count = model.num_inputs if count is None else count
        aspect_ratio = model.variant.aspect_ratio or (WIDE if model.random_bytes else None)
        names = [model.name, count, *variant_words(model.variant), model.fingerprint]
        names += ["own"] * (model.checkpoint is None)
        settings: dict[str, Any] = {"has_gt": model.has_gt, "count": count}
        settings |= {"aspect_ratio": aspect_ratio, "preset": model.preset}
        return GraphReference(self.make("write_inputs", *names, **source, **settings), **source)

    def scene_reference(self, count: int, side: int | None = None) -> SceneReference:
        """Return what PyTorch in float32 finds on held-out scenes, or why there is nothing."""
        model, file, note = self.model, None, ""
        settings: dict[str, Any] = {"checkpoint": model.checkpoint, "count": count, "side": side}
        settings["preset"] = model.preset
        try:
            if model.checkpoint is not None:
                names = (model.name, count, side or "own size", model.fingerprint)
                file = self.make("write_scenes", *names, **settings)
        except WorkerError as error:  # times and the ground truth are still worth having
            note = f"PyTorch float32 failed: {error}"
        return SceneReference(file, model.has_gt, note)
