"""Accuracy of a case against PyTorch float32, which is opened here, and the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.bench.case import Values, read_inputs
from coprs_deploy.bench.report import Accuracy
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PLAIN, PRESETS
from coprs_deploy.engines import Runner, RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.graphs import masks_at_original_size
from coprs_deploy.evaluation import metrics
from coprs_deploy.evaluation.metrics import EMPTY_IOU, count_pixels
from coprs_deploy.evaluation.rows import MaskCounts
from coprs_deploy.export import equivalence
from coprs_deploy.export.samples import RunnerOpener
from coprs_deploy.images import ResizeTransform, prepare_image
from coprs_deploy.logits import mask_cells, resize_logits
from coprs_deploy.policy import Policy, PolicyRequest, PolicyResult
from coprs_deploy.specs import (
    GRAPH_NAMES,
    IMAGE_ENCODER,
    MASK_DECODER,
    PRIOR,
    Geometry,
    graph_specs,
)


@dataclass(frozen=True)
class Reference:
    """What cases are compared with.

    Attributes:
        geometry: sizes of the model.
        policy_hidden_size: width of a concentration.
        open: opens the runner of a graph by name.
        note: for the report, if it is not PyTorch in float32.
    """

    geometry: Geometry
    policy_hidden_size: int
    open: RunnerOpener
    note: str = ""

    def graphs(self) -> SegmentationGraphs:
        """Open all graphs."""
        return SegmentationGraphs({name: self.open(name) for name in GRAPH_NAMES})


def open_reference(checkpoint: Path | None, bundle: Path | None = None) -> Reference:
    """Return PyTorch's float32 modules of a checkpoint on the CPU; without one, the bundle."""
    if checkpoint is not None:
        source = read_checkpoint(checkpoint)
        geometry, width = source.config.model.geometry, source.config.model.policy_hidden_size
        return Reference(
            geometry, width, equivalence.reference_opener(source, graph_specs(geometry, width))
        )
    assert bundle is not None
    opened, options = open_bundle(bundle), RunnerOptions()
    manifest, graph = opened.manifest, opened.manifest.graphs[IMAGE_ENCODER]
    own = f"({graph.runtime} {graph.precision}), no checkpoint was given"
    note = f"against the bundle's own graphs {own}"
    width = manifest.policy.hidden_size
    return Reference(
        manifest.geometry, width, lambda n: open_bundle_graph(opened, n, options), note
    )


def open_policy(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    library: str = "transformers",
    device: str = "cpu",
) -> Policy:
    """Open the policy of a checkpoint with a library that ``policy.availability`` lists."""
    if library == "vllm":
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy as PolicyType
    else:
        from coprs_deploy.policy.transformers_policy import (  # type: ignore[assignment]
            TransformersPolicy as PolicyType,
        )

    config, limits = checkpoint.config, checkpoint.config.policy_image
    sizes = (limits.min_pixels, limits.max_pixels)
    return PolicyType(checkpoint.policy_path, config.prompt, *sizes, device=device, dtype=dtype)


def ask(policy: Policy, example: Example) -> PolicyResult:
    """Ask the policy the question of an example."""
    result = list(policy.stream(PolicyRequest(example.image, example.instruction)))[-1]
    assert isinstance(result, PolicyResult)
    return result


def scenes(count: int, side: int | None = None, preset: str = PLAIN.name) -> list[Example]:
    """Generate held-out scenes of a preset, one question with one target each.

    ``side`` enlarges them to this side in pixels.
    """

    def enlarged(array: NDArray[Any], resampling: Image.Resampling) -> NDArray[Any]:
        return np.asarray(Image.fromarray(array).resize((side or 0, side or 0), resampling))

    drawn = count if PRESETS[preset].max_targets == 1 else 2 * count
    examples = held_out_examples(PRESETS[preset], drawn, 0)
    examples = [example for example in examples if len(example.masks) == 1][:count]
    for index, example in enumerate(examples if side else ()):
        image = enlarged(example.image, Image.Resampling.BICUBIC)
        masks = np.stack([enlarged(mask, Image.Resampling.NEAREST) for mask in example.masks])
        examples[index] = replace(example, image=image, masks=masks)
    return examples


def scene_outputs(policy: Policy, reference: Reference, examples: Sequence[Example]) -> Values:
    """Ask a policy about scenes, and decode the last target with the reference's graphs.

    Returns:
        By scene ``N.concentration``, ``N.mask``, which is empty without a target, and
        ``N.ground_truth``.
    """
    found: Values = {}
    with reference.graphs() as graphs:
        for index, example in enumerate(examples):
            vectors = ask(policy, example).concentrations
            mask = np.zeros(example.image.shape[:2], np.bool_)
            if len(vectors):
                prepared = prepare_image(example.image, reference.geometry)
                embedding, size = graphs.encode(prepared), prepared.unpadded_size
                _, chunks = graphs.priors_and_masks(embedding, vectors[-1:], size)
                (mask,) = masks_at_original_size(chunks, 1, prepared, reference.geometry)
            outputs = {"concentration": vectors, "mask": mask}
            outputs["ground_truth"] = metrics.union(example.masks)
            found |= {f"{index}.{name}": value for name, value in outputs.items()}
    return found


@dataclass(frozen=True)
class GraphReference:
    """Inputs of graphs with their float32 outputs, and what computed these.

    Attributes:
        folder: written by ``preparation.write_inputs``.
        checkpoint: checkpoint of the reference; None takes the graphs of ``bundle``.
        bundle: bundle of the reference.
    """

    folder: Path
    checkpoint: Path | None
    bundle: Path | None

    def accuracy(self, outputs: Callable[[Values], Values]) -> Accuracy:
        """Compare what ``outputs`` computes of each input, and the masks that follow from it.

        The reference's graphs carry the outputs of one graph to the mask.
        """
        reference = open_reference(self.checkpoint, self.bundle)
        pairs = [(outputs(sample), sample) for sample in read_inputs(self.folder)]
        with ExitStack() as stack:
            opened = [] if "mask_logits" in pairs[0][0] else [PRIOR, MASK_DECODER]
            runners = [stack.enter_context(reference.open(name)) for name in opened]
            compared = [_compare(*pair, runners, reference.geometry) for pair in pairs]
        found = _gt_metrics([each["gt"] for each in compared if "gt" in each])
        for name, metric, choose in (  # np.min and np.max keep a NaN; min and max may lose it
            ("embedding_cosine", "embedding_cosine", np.min),
            ("prior_relative_error", "prior_relative_error", np.max),
            ("mask_relative_error", "mask_relative_error", np.max),
            ("mask_iou_mean", "mask_iou", np.mean),
            ("mask_iou_min", "mask_iou", np.min),
        ):
            if values := [each[metric] for each in compared if metric in each]:
                found[name] = float(choose(values))
        digits = {name: float(f"{v:.9g}") if np.isfinite(v) else None for name, v in found.items()}
        return Accuracy(len(compared), note=reference.note, **digits)


def _compare(
    found: Values, sample: Values, runners: Sequence[Runner], geometry: Geometry
) -> dict[str, Any]:
    values, measured = {**sample, **found}, dict[str, Any]()
    for runner in runners[1:] if "prior_logits" in found else runners:
        values[runner.spec.outputs[0].name] = equivalence.run_graph(runner, values)
    if "image_embedding" in found:
        pair = found["image_embedding"], sample["image_embedding"]
        measured["embedding_cosine"] = equivalence.cosine_similarity(*pair)
    if "prior_logits" in found or "image_embedding" in found:
        pair = values["prior_logits"], sample["prior_logits"]
        measured["prior_relative_error"] = equivalence.relative_error(*pair)
    ours, theirs = values["mask_logits"], sample["mask_logits"]
    measured["mask_relative_error"] = equivalence.relative_error(ours, theirs)
    height, width = mask_cells(sample["unpadded_size"], geometry)
    valid = (..., slice(height), slice(width))
    measured["mask_iou"] = mask_agreement(ours[valid] > 0, theirs[valid] > 0)
    if "ground_truth" in sample:
        size = (int(sample["original_size"][0]), int(sample["original_size"][1]))
        prepared = ResizeTransform(sample["unpadded_size"], size)
        mask = np.any(resize_logits(ours, prepared, geometry) > 0, axis=0)
        measured["gt"] = count_pixels(mask, sample["ground_truth"].astype(np.bool_))
    return measured


@dataclass(frozen=True)
class SceneReference:
    """What the masks of held-out scenes are compared with.

    Attributes:
        file: written by ``preparation.write_scenes``; None without float32.
        has_gt: whether masks are compared with the ground truth.
        note: why there is no file.
    """

    file: Path | None
    has_gt: bool
    note: str = ""

    def accuracy(self, found: Values) -> Accuracy:
        """Compare ``N.mask``, and ``N.concentration`` and ``N.ground_truth`` if any, by scene."""
        numbers = [key.removesuffix(".mask") for key in found if key.endswith(".mask")]
        compared: dict[str, Any] = {}
        if self.file is not None:
            from safetensors.numpy import load_file

            expected = load_file(self.file)
            ious = [mask_agreement(found[f"{i}.mask"], expected[f"{i}.mask"]) for i in numbers]
            compared = {"mask_iou_mean": float(np.mean(ious)), "mask_iou_min": float(np.min(ious))}
            compared["concentration_cosine"] = _min_cosine(found, expected)
        keys = [(f"{i}.mask", f"{i}.ground_truth") for i in numbers] if self.has_gt else []
        gt = [count_pixels(*(found[key] for key in pair)) for pair in keys]
        return Accuracy(len(numbers), **compared, **_gt_metrics(gt), note=self.note)


def mask_agreement(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """Return the IoU of two masks; two empty masks agree (1.0)."""
    return metrics.iou(count_pixels(found, expected), empty=1.0)


def _gt_metrics(counts: Sequence[MaskCounts]) -> dict[str, float]:
    if not counts:
        return {}
    precision = metrics.precision_at(counts, 0.5, empty=EMPTY_IOU)
    return {"giou": metrics.giou(counts, empty=EMPTY_IOU), "precision_at_50": precision}


def _min_cosine(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float | None:
    """Return the smallest cosine over the questions with equally many targets in both."""
    pairs = [(found[key], expected[key]) for key in found if key.endswith(".concentration")]
    vectors = [pair for a, b in pairs if a.shape == b.shape for pair in zip(a, b, strict=True)]
    return (
        float(np.min([equivalence.cosine_similarity(*pair) for pair in vectors]))
        if vectors
        else None
    )
