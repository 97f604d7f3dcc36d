"""Fixtures: checkpoints, bundles, inputs and float32 references, each made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from coprs_deploy import demo
from coprs_deploy.bench.availability import runtime_version
from coprs_deploy.bench.case import Evaluate
from coprs_deploy.bench.options import BenchOptions
from coprs_deploy.bench.process import Worker, WorkerError, call_once
from coprs_deploy.bench.report import Accuracy
from coprs_deploy.bundle import (
    POLICY_GRAPHS_DIRECTORY,
    TRT_VARIANT_NAMES,
    EngineRecord,
    Manifest,
    open_bundle,
    read_manifest,
)
from coprs_deploy.checkpoint import POLICY_DIRECTORY, SEGMENTATION_FILE, read_checkpoint
from coprs_deploy.closing import Closeable
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR, OptimizationProfile

T = TypeVar("T")

DEMO_INPUTS = 16
RANDOM_INPUTS = {"tiny": 3, "vit_b": 2, "vit_l": 1, "vit_h": 1}
"""Numbers of inputs for accuracy; PyTorch's reference of a large encoder takes long."""

CALIBRATION_IMAGES, FEW_CALIBRATION_IMAGES = 32, 4
"""For the int8 of trained weights, and of random ones, whose speed does not depend on them."""

PREPARE_TIMEOUT_S = 1800.0

WIDE = "16:9"
"""Aspect ratio of most cameras, which encoders of real size are measured for too."""


@dataclass(frozen=True)
class ExportVariant:
    """Variant of an export, written as the options of ``export``; empty takes any aspect ratio."""

    targets: str = "1"
    images: str = "1"
    aspect_ratio: str = ""
    drop_padding: bool = False

    @property
    def description(self) -> str:
        """The fixed aspect ratio in words; empty for any."""
        padding = " without padding" if self.drop_padding else ""
        return f"for {self.aspect_ratio}{padding}" if self.aspect_ratio else ""

    @property
    def suffix(self) -> str:
        """End of the names of its folders."""
        parts = [f"{self.targets}x{self.images}".replace(",", "-")]
        parts += [self.aspect_ratio.replace(":", "to")] if self.aspect_ratio else []
        return "-".join([*parts, *["dropped"] * self.drop_padding])

    def matches(self, manifest: Manifest) -> bool:
        """Whether the graphs of a bundle are of this variant."""
        encoder, prior = manifest.graphs[IMAGE_ENCODER].spec, manifest.graphs[PRIOR].spec
        profiles = (OptimizationProfile.parse(self.targets), OptimizationProfile.parse(self.images))
        found = ExportVariant.of(manifest)
        wanted = (*profiles, self.aspect_ratio, self.drop_padding)
        return wanted == (prior.targets, encoder.images, found.aspect_ratio, found.drop_padding)

    @classmethod
    def of(cls, manifest: Manifest) -> ExportVariant:
        """Return a bundle's aspect ratio, with one image and one target in a call."""
        valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
        if valid_region is None:
            return cls()
        width, height = valid_region.aspect_ratio
        return cls(aspect_ratio=f"{width}:{height}", drop_padding=valid_region.drops_padding)


@dataclass(frozen=True)
class Model:
    """What is measured: the demo model, a user's bundle, or a SAM size with random weights.

    Attributes:
        num_inputs: number of inputs for accuracy.
        has_gt: whether its masks of held-out scenes mean something.
        variant: variant of its bundle.
    """

    name: str
    checkpoint: Path | None
    bundle: Path | None
    num_inputs: int = 3
    has_gt: bool = False
    is_random: bool = False
    variant: ExportVariant = ExportVariant()

    @property
    def estimated_bytes(self) -> int:
        """Memory of a process with its largest graph, libraries excluded.

        A ViT-B of 375 MB peaks near 2 GB, a ViT-H of 2.5 GB near 7 GB.
        """
        file = self.checkpoint / SEGMENTATION_FILE if self.checkpoint is not None else None
        stored = file.stat().st_size if file is not None else 0
        return 100_000_000 + (1_000_000_000 + 5 * stored // 2 if stored > 50_000_000 else 0)

    @property
    def request_bytes(self) -> int:
        """Memory of a process with libraries, graphs and policy."""
        folder = self.checkpoint / POLICY_DIRECTORY if self.checkpoint is not None else None
        if folder is None and self.bundle is not None:
            policy_path = read_manifest(self.bundle).policy.path or POLICY_GRAPHS_DIRECTORY
            folder = self.bundle / policy_path
        policy = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder else 0
        return 600_000_000 + self.estimated_bytes + 6 * policy // 5

    def holds(self, runtimes: list[str], precision: str, variant: ExportVariant) -> bool:
        """Whether its own bundle has such graphs, which can run here."""
        manifest = read_manifest(self.bundle) if self.bundle is not None else None
        if manifest is None or not variant.matches(manifest):
            return False
        graph = manifest.graphs[IMAGE_ENCODER]
        is_loadable = graph.engine is None or _loads_here(graph.engine)
        return is_loadable and graph.runtime in runtimes and graph.precision == precision


def open_model(bundle: Path | None, checkpoint: Path | None) -> Model:
    """Describe the demo model, or a user's bundle, whose files are checked.

    Raises:
        BundleError: the bundle is not usable.
        ValueError: it was exported from another checkpoint.
    """
    if bundle is None:
        return Model("demo", demo.CHECKPOINT, demo.BUNDLE, DEMO_INPUTS, has_gt=True)
    manifest = open_bundle(bundle).manifest
    if checkpoint is not None:
        found = read_checkpoint(checkpoint).fingerprint()
        if found != manifest.checkpoint_fingerprint:
            raise ValueError(
                f"--checkpoint {checkpoint} ({found[:12]}) is not what {bundle} was exported from "
                f"({manifest.checkpoint_fingerprint[:12]}); name that one, or leave it out"
            )
    return Model(bundle.resolve().name, checkpoint, bundle, variant=ExportVariant.of(manifest))


class Fixtures(Closeable):
    """Fixtures of one benchmark run, in a folder; what an earlier run left there is used again."""

    def __init__(
        self, folder: Path, options: BenchOptions, progress: Callable[[str], None] = lambda s: None
    ) -> None:
        self.folder, self.options, self.progress = folder, options, progress
        self.model = open_model(options.bundle, options.checkpoint)
        self._made: dict[Path, Any] = {}
        self._reference: Worker | None = None

    def models(self) -> list[Model]:
        """Return the sizes with random weights, or else the requested model."""
        return [self._random(size) for size in self.options.sizes] or [self.model]

    def _random(self, size: str) -> Model:
        out = self.make(f"{size}-checkpoint", "make_random_checkpoint", sam=size)
        return Model(size, out, None, RANDOM_INPUTS[size], is_random=True)

    def make(self, name: str, function: str, **settings: Any) -> Path:
        """Make a file or folder by a function of :mod:`coprs_deploy.bench.preparation`, once.

        The function runs in a process of its own; what an earlier run made is taken as it is.

        Raises:
            WorkerError: it failed.
        """
        out = self.folder / name
        unfinished = out.with_name(f"unfinished-{name}")

        def made() -> Path:
            if not out.exists():
                self.progress(f"{function.replace('_', ' ')}: {name}")
                target = f"coprs_deploy.bench.preparation:{function}"
                call_once(target, PREPARE_TIMEOUT_S, out=str(unfinished), **_plain(settings))
                unfinished.rename(out)
            return out

        return self.once(out, made)

    def once(self, key: Path, make: Callable[[], T]) -> T:
        """Make something once a run; an error is raised again, not tried again."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except WorkerError as error:
                self._made[key] = error
        if isinstance(self._made[key], WorkerError):
            raise self._made[key]
        made: T = self._made[key]
        return made

    def bundle(
        self, model: Model, runtime: str, precision: str, variant: ExportVariant | None = None
    ) -> str:
        """Return a bundle for a runtime: the model's own, an earlier export or a new one.

        Runtimes that read ONNX files share a bundle; without a variant it is the model's own.

        Raises:
            WorkerError: the export failed.
        """
        variant, is_engine = variant or model.variant, runtime in TRT_VARIANT_NAMES
        alike = [runtime] if is_engine else ["onnxruntime", "openvino"]
        if model.holds(alike, precision, variant):
            return str(model.bundle)
        if model.checkpoint is None:
            raise WorkerError("the bundle has no such graphs; name its checkpoint: --checkpoint")
        made_of = [self.once(model.checkpoint, read_checkpoint(model.checkpoint).fingerprint)[:12]]
        gpu = current_gpu()
        if is_engine and gpu is not None:
            made_of += [runtime_version(runtime), gpu.compute_capability]
        kind = [model.name, runtime if is_engine else "onnx", precision, variant.suffix]
        calibration = self.calibration(model, variant) if precision == "int8" else None
        settings = {"runtime": runtime, "precision": precision, "calibration": calibration}
        source = {"checkpoint": model.checkpoint, **settings, **asdict(variant)}
        out = self.make("-".join(kind + made_of), "export_bundle", **source)
        return str(open_bundle(out).path)

    def calibration(self, model: Model, variant: ExportVariant) -> str:
        """Return a folder of images for int8: the user's, or scenes cut to an aspect ratio."""
        if self.options.calibration is not None:
            return str(self.options.calibration)
        if not (model.has_gt or model.is_random):
            raise WorkerError("int8 is calibrated on images; name a folder with --calibration")
        count = CALIBRATION_IMAGES if model.has_gt else FEW_CALIBRATION_IMAGES
        name = f"calibration-{count}-{variant.aspect_ratio.replace(':', 'to') or 'square'}"
        settings = {"count": count, "aspect_ratio": variant.aspect_ratio}
        return str(self.make(name, "draw_images", **settings))

    def inputs(self, model: Model, count: int | None = None) -> str:
        """Return the folder of a model's inputs and their float32 outputs."""
        count = model.num_inputs if count is None else count
        folder = self.folder / f"{model.name}-inputs-{count}"

        def write() -> str:
            self.progress(f"{model.name}: inputs and float32 reference")
            aspect_ratio = model.variant.aspect_ratio or (WIDE if model.is_random else "")
            source = {"checkpoint": model.checkpoint, "bundle": model.bundle}
            settings = {"has_gt": model.has_gt, "count": count, "aspect_ratio": aspect_ratio}
            target = "coprs_deploy.bench.reference:write_inputs"
            self.call_reference(target, folder=folder, **source, **settings)
            return str(folder)

        return self.once(folder, write)

    def evaluate(self, function: str, **settings: Any) -> Evaluate:
        """Bind a function of :mod:`coprs_deploy.bench.accuracy`; it calls settings that can be."""

        def evaluate(outputs: Mapping[str, Path]) -> Mapping[str, Accuracy]:
            given = {name: v() if callable(v) else v for name, v in settings.items()}
            target = f"coprs_deploy.bench.accuracy:{function}"
            found = self.call_reference(target, outputs=_plain(outputs), **given)
            return {name: Accuracy.from_json(accuracy) for name, accuracy in found.items()}

        return evaluate

    def evaluate_graphs(self, model: Model, count: int | None = None) -> Evaluate:
        """Compare the outputs of a model's graphs with float32."""
        source = {"checkpoint": model.checkpoint, "bundle": model.bundle}
        return self.evaluate("evaluate_graphs", folder=partial(self.inputs, model, count), **source)

    def call_reference(self, target: str, **settings: Any) -> Any:
        """Call a function in the one process that holds PyTorch; it is paused between calls."""
        if self._reference is None:
            self._reference = Worker()
        self._reference.resume()
        try:
            result = self._reference.call(target, PREPARE_TIMEOUT_S, **_plain(settings))
        except WorkerError:
            self.close()
            raise
        self._reference.pause()
        return result

    def close(self) -> None:
        """End the process that holds the reference."""
        if self._reference is not None:
            self._reference.close()
            self._reference = None


def _loads_here(engine: EngineRecord) -> bool:
    """Whether an engine is for the library and the GPU of this machine."""
    gpu, version = current_gpu(), TRT_VARIANTS[engine.variant].load().__version__
    is_here = gpu is not None and gpu.compute_capability in engine.compute_capabilities
    return is_here and engine.version == version


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn paths into strings, which JSON can hold."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
