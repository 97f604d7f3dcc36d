"""Makes what suites measure, each thing once: checkpoints, bundles, inputs, references."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coprs_deploy import demo
from coprs_deploy.benchmarks.arrays import Values
from coprs_deploy.benchmarks.case import SceneEvaluator
from coprs_deploy.benchmarks.form import ANY_PICTURE, WIDE, Form
from coprs_deploy.benchmarks.mask_judge import judge_masks, read_masks
from coprs_deploy.benchmarks.onnx_work import GraphWork, count_work
from coprs_deploy.benchmarks.process import Worker, WorkerError, call_once
from coprs_deploy.benchmarks.report import Accuracy, LeftOut
from coprs_deploy.bundle import (
    MANIFEST_FILE,
    TRT_VARIANT_NAMES,
    EngineRecord,
    open_bundle,
    read_manifest,
)
from coprs_deploy.checkpoint import POLICY_DIRECTORY, SEGMENTATION_FILE, read_checkpoint
from coprs_deploy.closing import Closeable
from coprs_deploy.engines import ONNX_RUNTIMES, runtime_module, runtime_names
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.trt.variants import TRT_VARIANTS
from coprs_deploy.errors import BundleError, CoPRSError
from coprs_deploy.specs import IMAGE_ENCODER

STEPS = "coprs_deploy.benchmarks.steps"
INPUTS = "coprs_deploy.benchmarks.inputs"
SUBJECTS = "coprs_deploy.benchmarks.answer_subjects"
POLICY_JUDGE = "coprs_deploy.benchmarks.policy_judge"

SHIPPED_INPUTS = 16
RANDOM_INPUTS = {"tiny": 3, "vit_b": 2, "vit_l": 1, "vit_h": 1}
"""How many inputs accuracy is measured on; PyTorch's reference of a large encoder takes long."""

GOOD_PICTURES, FEW_PICTURES = 32, 4
"""For the int8 of trained weights, and of random ones, whose speed does not depend on them."""

PREPARE_SECONDS = 1800.0
"""Limit of one step of preparation."""


@dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        name: for labels: ``shipped``, the name of the bundle's folder, or a SAM size.
        checkpoint: the PyTorch weights; None where only a bundle is there.
        bundle: an exported bundle; None where it has to be made.
        has_truth: whether its answers to held-out scenes mean something.
        is_random: whether its weights are random, of a real size.
        form: which pictures its bundle takes.
        num_inputs: how many inputs its accuracy is measured on.
    """

    name: str
    checkpoint: Path | None
    bundle: Path | None
    has_truth: bool = False
    num_inputs: int = 3
    is_random: bool = False
    form: Form = ANY_PICTURE

    @property
    def estimated_bytes(self) -> int:
        """Memory that a process with its largest graph takes, libraries left out.

        A ViT-B of 375 MB peaks near 2 GB, a ViT-H of 2.5 GB near 7 GB.
        """
        file = self.checkpoint / SEGMENTATION_FILE if self.checkpoint is not None else None
        stored = file.stat().st_size if file is not None else 0
        return 100_000_000 + (1_000_000_000 + 5 * stored // 2 if stored > 50_000_000 else 0)

    @property
    def answer_bytes(self) -> int:
        """Memory that a process takes which answers: libraries, graphs and policy."""
        folder = self.checkpoint / POLICY_DIRECTORY if self.checkpoint is not None else None
        if folder is None and self.bundle is not None:
            folder = self.bundle / read_manifest(self.bundle).policy.path
        policy = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder else 0
        return 600_000_000 + self.estimated_bytes + 6 * policy // 5


@dataclass(frozen=True)
class Exported:
    """A bundle that was made, or why it could not be.

    Attributes:
        runtime: that shall run it; another one may have been named when it was exported.
        precision: of its graphs.
        path: the bundle.
        problem: empty when it is there.
    """

    runtime: str
    precision: str
    path: Path
    problem: str = ""


class Workshop(Closeable):
    """One run's preparations.

    Args:
        folder: where everything is made; what an earlier run left there is used again.
        model: the bundle that was asked for.
        sizes: SAM sizes that are measured with random weights, where a suite needs no policy.
        devices: ``cpu``, and ``cuda`` where there is one.
        only: a regular expression; rows are measured whose group and name hold it.
        calibration: folder of pictures for int8; None draws some, but not for a user's model.
        is_quick: whether suites leave out what takes long and is not asked for by name.
        progress: called with the name of each step as it starts.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        *,
        sizes: tuple[str, ...] = (),
        devices: tuple[str, ...] = ("cpu",),
        only: str = "",
        calibration: Path | None = None,
        is_quick: bool = False,
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.devices = devices
        self.is_quick = is_quick
        self.progress = progress
        self._sizes = sizes
        self._pictures = calibration
        self._only = re.compile(only)
        self._inputs: set[Path] = set()
        self._answered: set[Path] = set()
        self._referee: Worker | None = None
        self._counted: dict[Path, GraphWork | None] = {}

    def wants(self, group: str, row: str = "") -> bool:
        """Say whether a row was asked for by the names of its group and its own."""
        return self._only.search(f"{group}: {row}") is not None

    def models(self) -> list[Model]:
        """Give the sizes with random weights, or else the model that was asked for."""
        return [self._random(size) for size in self._sizes] or [self.model]

    def _random(self, size: str) -> Model:
        checkpoint = self.folder / f"{size}-checkpoint"
        if not (checkpoint / SEGMENTATION_FILE).exists():
            self.progress(f"{size}: random weights")
            target = f"{STEPS}:make_random_checkpoint"
            call_once(target, PREPARE_SECONDS, out=str(checkpoint), sam=size)
        return Model(size, checkpoint, None, num_inputs=RANDOM_INPUTS[size], is_random=True)

    def bundle(
        self,
        model: Model,
        runtime: str,
        precision: str,
        form: Form | None = None,
    ) -> Exported:
        """Give a bundle for a runtime in a precision: the model's own, an earlier, a new one.

        Runtimes that read ONNX files share a bundle where their graphs are exported alike.

        Args:
            model: the model.
            runtime: that shall run the graphs.
            precision: of the graphs.
            form: None takes pictures as the model's own bundle does.
        """
        form = model.form if form is None else form
        alike = (runtime,) if runtime in TRT_VARIANT_NAMES else ONNX_RUNTIMES
        folders = {
            r: self.folder / f"{model.name}-{r}-{precision}-{form.suffix}"
            for r in (runtime, *alike)
        }
        out = folders[runtime]
        for known in (model.bundle, *folders.values()):
            if known is not None and _is(known, alike, precision, form, model):
                return Exported(runtime, precision, known)
        if model.checkpoint is None:
            problem = "the bundle holds no such graphs; name its checkpoint with --checkpoint"
            return Exported(runtime, precision, out, problem)
        try:
            calibration = (
                self.calibration(model, form.aspect_ratio) if precision == "int8" else None
            )
            self.progress(
                f"{model.name}: export for {runtime} {precision} {form.aspect_ratio}".strip()
            )
            call_once(
                f"{STEPS}:export_bundle",
                PREPARE_SECONDS,
                checkpoint=str(model.checkpoint),
                out=str(out),
                runtime=runtime,
                precision=precision,
                calibration=calibration,
                **asdict(form),
            )
        except WorkerError as error:
            return Exported(runtime, precision, out, str(error))
        return Exported(runtime, precision, out)

    def calibration(self, model: Model, aspect_ratio: str = "") -> str:
        """Give a folder of pictures for int8: the user's, or drawn scenes, cut to an aspect.

        Raises:
            WorkerError: none were named for a model of the user's.
        """
        if self._pictures is not None:
            return str(self._pictures)
        if not (model.has_truth or self._sizes):
            raise WorkerError("int8 is calibrated on pictures; name a folder with --calibration")
        count = GOOD_PICTURES if model.has_truth else FEW_PICTURES
        folder = (
            self.folder
            / f"calibration-{count}{aspect_ratio and '-'}{aspect_ratio.replace(':', 'to')}"
        )
        if not folder.exists():
            settings = {"folder": str(folder), "count": count, "aspect_ratio": aspect_ratio}
            call_once(f"{STEPS}:draw_pictures", PREPARE_SECONDS, **settings)
        return str(folder)

    def inputs(self, model: Model, count: int | None = None) -> str:
        """Give the folder of a model's inputs and their float32 outputs.

        Raises:
            WorkerError: they could not be made.
        """
        count = model.num_inputs if count is None else count
        folder = self.folder / f"{model.name}-inputs-{count}"
        if folder not in self._inputs:
            self.progress(f"{model.name}: inputs and float32 reference")
            self._ask_referee(
                f"{INPUTS}:write_inputs",
                folder=str(folder),
                checkpoint=_text(model.checkpoint),
                bundle=_text(model.bundle),
                has_truth=model.has_truth,
                count=count,
                aspect_ratio=model.form.aspect_ratio or (WIDE if model.is_random else ""),
            )
            self._inputs.add(folder)
        return str(folder)

    def judge(self, model: Model, inputs: str) -> SceneEvaluator:
        """Give the judge of rows that left the outputs of a model's graphs."""

        def judge(outputs: Mapping[str, Path]) -> Mapping[str, Accuracy]:
            found = self._ask_referee(
                f"{INPUTS}:judge",
                folder=inputs,
                outputs={name: str(path) for name, path in outputs.items()},
                checkpoint=_text(model.checkpoint),
                bundle=_text(model.bundle),
            )
            return {name: Accuracy.from_json(accuracy) for name, accuracy in found.items()}

        return judge

    def answers_judge(self, model: Model, count: int, side: int | None = None) -> SceneEvaluator:
        """Give the judge of rows that answered the first scenes.

        Args:
            model: the model.
            count: how many scenes at most.
            side: of the pictures; None leaves the scenes as they are.
        """

        def judge(outputs: Mapping[str, Path]) -> Mapping[str, Accuracy]:
            masks = read_masks(outputs)
            if not masks or model.checkpoint is None:
                return judge_masks(masks, None, model.has_truth)
            try:
                expected = self._answers(model, model.checkpoint, count, side)
            except WorkerError as error:
                note = f"float32 could not be asked: {error}"
                return judge_masks(masks, None, model.has_truth, note)
            return judge_masks(masks, expected, model.has_truth)

        return judge

    def _answers(self, model: Model, checkpoint: Path, count: int, side: int | None) -> Values:
        """Give the masks of PyTorch's float32 answers, made once a run."""
        folder = self.folder / f"{model.name}-answers-{count}-{side or 'own-size'}"
        if folder not in self._answered:
            self.progress(f"{model.name}: float32 answers")
            self._ask_referee(
                f"{SUBJECTS}:write_answers",
                folder=str(folder),
                checkpoint=str(checkpoint),
                count=count,
                side=side,
            )
            self._answered.add(folder)
        return read_masks({"": folder})[""]

    def policy_judge(self, model: Model, float32: Sequence[str], count: int) -> SceneEvaluator:
        """Give the judge of policies that left their concentrations for the first scenes.

        Args:
            model: the model.
            float32: rows in float32; the others are compared with the first that was measured.
            count: how many scenes.
        """

        def judge(outputs: Mapping[str, Path]) -> Mapping[str, Accuracy]:
            reference = next((name for name in float32 if name in outputs), None)
            found = self._ask_referee(
                f"{POLICY_JUDGE}:judge_policies",
                outputs={name: str(path) for name, path in outputs.items()},
                reference=reference,
                checkpoint=str(model.checkpoint),
                count=count,
                has_truth=model.has_truth,
            )
            return {name: Accuracy.from_json(accuracy) for name, accuracy in found.items()}

        return judge

    def _ask_referee(self, target: str, **settings: Any) -> Any:
        """Call a function in the one process that holds PyTorch; it rests between two calls."""
        if self._referee is None:
            self._referee = Worker()
        self._referee.resume()
        try:
            result = self._referee.call(target, PREPARE_SECONDS, **settings)
        except WorkerError:
            self._referee.close()
            self._referee = None
            raise
        self._referee.pause()
        return result

    def close(self) -> None:
        """End the process that holds the reference."""
        if self._referee is not None:
            self._referee.close()
            self._referee = None

    def work(self, path: Path) -> GraphWork | None:
        """Count a graph file; None where it cannot be counted."""
        if path not in self._counted:
            try:
                self._counted[path] = count_work(path)
            except (CoPRSError, ValueError):
                self._counted[path] = None
        return self._counted[path]

    def runtimes(self, suite: str) -> tuple[list[tuple[str, str]], list[LeftOut]]:
        """Name the runtimes that can run graphs here, with their device, and what is left out."""
        present, left_out = [], []
        for name in runtime_names():
            for entry in runtime_module(name).availability():
                default = "cuda" if name in TRT_VARIANT_NAMES else "cpu"
                device = entry.name.partition(" ")[2] or default
                if not entry.is_available:
                    left_out.append(LeftOut(suite, entry.name, entry.detail, entry.remedy))
                elif device in self.devices:
                    present.append((name, device))
                else:
                    left_out.append(LeftOut(suite, entry.name, "it was not asked for"))
        return present, left_out

    def devices_of(self, runtime: str, suite: str) -> tuple[list[str], list[LeftOut]]:
        """Name the devices on which a runtime can run graphs here, and those that are left out."""
        present, left_out = self.runtimes(suite)
        devices = [device for name, device in present if name == runtime]
        return devices, [entry for entry in left_out if entry.name.split()[0] == runtime]


def shipped_model() -> Model:
    """The model that comes with the package."""
    return Model("shipped", demo.CHECKPOINT, demo.BUNDLE, True, SHIPPED_INPUTS)


def model_from_bundle(bundle: Path, checkpoint: Path | None) -> Model:
    """Describe a user's bundle; its files are checked.

    Raises:
        BundleError: it is not usable.
        ValueError: it was exported from another checkpoint.
    """
    manifest = open_bundle(bundle).manifest
    if checkpoint is not None:
        found = read_checkpoint(checkpoint).fingerprint()
        if found != manifest.checkpoint_fingerprint:
            raise ValueError(
                f"--checkpoint {checkpoint} ({found[:12]}) is not what {bundle} was exported from "
                f"({manifest.checkpoint_fingerprint[:12]}); name that one, or leave it out"
            )
    form = Form.of_pictures(manifest)
    return Model(bundle.resolve().name, checkpoint, bundle, form=form)


def version_of(*packages: str) -> str:
    """Give the version of the first of these packages that is installed; empty without one."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _is(bundle: Path, runtimes: tuple[str, ...], precision: str, form: Form, model: Model) -> bool:
    """Whether a whole bundle of one of these runtimes, this precision and this model is there."""
    if not (bundle / MANIFEST_FILE).is_file():
        return False
    try:
        manifest = open_bundle(bundle).manifest
    except BundleError:
        return False
    encoder = manifest.graphs[IMAGE_ENCODER]
    if encoder.runtime not in runtimes or encoder.precision != precision:
        return False
    if encoder.engine is not None and not _fits(encoder.engine):
        return False
    if not form.is_of(manifest):
        return False
    if model.checkpoint is None or bundle == model.bundle:
        return True
    return read_checkpoint(model.checkpoint).fingerprint() == manifest.checkpoint_fingerprint


def _fits(engine: EngineRecord) -> bool:
    """Whether an engine is for the library and the GPU that are here."""
    gpu, version = current_gpu(), TRT_VARIANTS[engine.variant].load().__version__
    is_here = gpu is not None and gpu.compute_capability in engine.compute_capabilities
    return is_here and engine.version == version


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
