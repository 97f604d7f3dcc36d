"""What graphs are fed with in a benchmark, what PyTorch makes of it in float32, and the judgement.

The shipped model gets held-out scenes with the concentrations that its own policy finds, and is
judged against the true masks too; any other model gets the drawn inputs of the equivalence check.
Everything is written once into a folder that the processes of all rows read.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.artifacts import write_json
from coprs_deploy.benchmarks.arrays import (
    OUTPUT_FILE,
    Values,
    read_arrays,
    read_inputs,
    write_arrays,
)
from coprs_deploy.benchmarks.report import Accuracy
from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.evaluation.metrics import overlap
from coprs_deploy.export.equivalence import mask_iou, reference_opener
from coprs_deploy.export.samples import RunnerOpener, sample_inputs
from coprs_deploy.images import (
    PreparedImage,
    mask_cells,
    prepare_image,
    resize_logits,
    unpadded_size,
)
from coprs_deploy.specs import (
    GRAPH_NAMES,
    IMAGE_ENCODER,
    MASK_DECODER,
    PRIOR,
    Geometry,
    GraphSpec,
    ValidRegion,
    graph_specs,
    parse_aspect_ratio,
)

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.policy import Policy, PolicyResult


COMPLETE_FILE = "complete.json"
"""Written last; holds the fingerprint of the weights."""


def write_inputs(
    folder: str,
    checkpoint: str | None,
    bundle: str | None,
    has_truth: bool,
    count: int,
    *,
    aspect_ratio: str = "",
) -> dict[str, Any]:
    """Write ``0.safetensors`` and so on: inputs and float32 outputs of every stage.

    What is there of the same weights is left as it is.

    Args:
        folder: made if it is not there.
        checkpoint: whose PyTorch modules are the reference; None takes the bundle's own graphs.
        bundle: where the graphs come from when there is no checkpoint.
        has_truth: whether the policy answers held-out scenes, whose true masks are kept.
        count: how many.
        aspect_ratio: that drawn pictures shall have or be longer than, as in ``16:9``; empty draws some
            of any shape.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    made = out / COMPLETE_FILE
    source = (
        read_checkpoint(checkpoint).fingerprint()
        if checkpoint is not None
        else read_manifest(bundle or "").checkpoint_fingerprint
    )
    complete = {"source": source, "aspect_ratio": aspect_ratio}
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == complete:
        return {}
    for stale in out.glob("*.safetensors"):
        stale.unlink()
    geometry, width, opener, _ = _reference(checkpoint, bundle)
    if has_truth:
        assert checkpoint is not None
        samples = list(_scene_inputs(read_checkpoint(checkpoint), geometry, count))
    else:
        samples = [
            {
                "image": sample.prepared.image,
                "concentration": sample.concentration,
                "unpadded_size": sample.prepared.unpadded_size,
                "original_size": np.array(sample.prepared.original_size),
            }
            for sample in sample_inputs(
                geometry, width, valid_region=_extent(aspect_ratio, geometry)
            )[:count]
        ]
    for name in GRAPH_NAMES:
        with opener(name) as runner:
            for sample in samples:
                found = runner(**{t.name: sample[t.name] for t in runner.spec.inputs})
                for tensor, value in found.items():
                    sample[tensor] = np.asarray(value.numpy())
    for index, sample in enumerate(samples):
        write_arrays(out / f"{index}.safetensors", sample)
    write_json(made, complete)
    return {}


def _extent(aspect_ratio: str, geometry: Geometry) -> ValidRegion | None:
    """Just the aspect, whatever an encoder may take beyond it."""
    if not aspect_ratio:
        return None
    width, height = parse_aspect_ratio(aspect_ratio)
    return ValidRegion((width, height), *unpadded_size(height, width, geometry.image_size))


def judge(
    folder: str, outputs: Mapping[str, str], checkpoint: str | None, bundle: str | None
) -> dict[str, dict[str, Any]]:
    """Compare what rows gave with float32: their own output, and what follows from it.

    A row that ran one stage is carried to the mask by the reference's stages.

    Args:
        folder: of the inputs.
        outputs: folder of each row's outputs, by the row's name.
        checkpoint: as in :func:`write_inputs`.
        bundle: likewise.

    Returns:
        An :class:`Accuracy` as JSON, by row.
    """
    geometry, _, opener, words = _reference(checkpoint, bundle)
    with opener(PRIOR) as prior, opener(MASK_DECODER) as decoder:
        runners = {PRIOR: prior, MASK_DECODER: decoder}
        accuracies = {}
        for name, place in outputs.items():
            given = read_arrays(Path(place) / OUTPUT_FILE)
            judged = [
                _judge_sample(index, given, sample, runners, geometry)
                for index, sample in enumerate(read_inputs(folder))
            ]
            note = "" if checkpoint else f"against {words}"
            accuracies[name] = _summarize(judged, note).to_json()
    return accuracies


def _judge_sample(
    index: int,
    given: Mapping[str, NDArray[Any]],
    sample: Values,
    runners: Mapping[str, Any],
    geometry: Geometry,
) -> dict[str, float]:
    found = {
        tensor: given[f"{index}.{tensor}"].astype(np.float32)
        for tensor in ("image_embedding", "prior_logits", "mask_logits")
        if f"{index}.{tensor}" in given
    }
    figures: dict[str, float] = {}
    values = dict(sample)
    if "image_embedding" in found:
        values["image_embedding"] = found["image_embedding"]
        figures["embedding_cosine"] = _cosine(found["image_embedding"], sample["image_embedding"])
    if "mask_logits" not in found:
        if "prior_logits" not in found:
            values["prior_logits"] = _run(runners[PRIOR], values)["prior_logits"]
        else:
            values["prior_logits"] = found["prior_logits"]
        values["mask_logits"] = _run(runners[MASK_DECODER], values)["mask_logits"]
    else:
        values.update(found)
    if "prior_logits" in found or "image_embedding" in found:
        figures["prior_error"] = _error(values["prior_logits"], sample["prior_logits"])
    figures["mask_error"] = _error(values["mask_logits"], sample["mask_logits"])
    height, width = mask_cells(sample["unpadded_size"], geometry)
    inside = (..., slice(height), slice(width))
    figures["mask_iou"] = mask_iou(values["mask_logits"][inside], sample["mask_logits"][inside])
    if "truth" in sample:
        size = (int(sample["original_size"][0]), int(sample["original_size"][1]))
        prepared = PreparedImage(sample["image"], sample["unpadded_size"], size)
        mask = np.any(resize_logits(values["mask_logits"], prepared, geometry) > 0, axis=0)
        figures["truth_iou"] = overlap(mask, sample["truth"].astype(np.bool_)).iou
        figures["hit"] = float(figures["truth_iou"] > 0.5)
    return figures


def _summarize(judged: list[dict[str, float]], note: str) -> Accuracy:
    def pick(name: str) -> list[float]:
        return [figures[name] for figures in judged if name in figures]

    def extreme(name: str, choose: Any) -> float | None:
        values = pick(name)
        # A value that is no number must not be lost in a comparison.
        return _digits(float(choose(np.array(values)))) if values else None

    return Accuracy(
        inputs=len(judged),
        embedding_cosine=extreme("embedding_cosine", np.min),
        prior_error=extreme("prior_error", np.max),
        mask_error=extreme("mask_error", np.max),
        mask_iou=extreme("mask_iou", np.mean),
        mask_iou_worst=extreme("mask_iou", np.min),
        truth_iou=extreme("truth_iou", np.mean),
        precision_at_half=extreme("hit", np.mean),
        note=note,
    )


def _digits(value: float) -> float | None:
    return float(f"{value:.9g}") if np.isfinite(value) else None


def _cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    difference = np.abs(found.astype(np.float64) - expected)
    return float(difference.max() / (np.abs(expected).max() or 1.0))


def _run(runner: Any, values: Mapping[str, NDArray[Any]]) -> Values:
    given = runner(**{tensor.name: values[tensor.name] for tensor in runner.spec.inputs})
    return {name: value.numpy() for name, value in given.items()}


def _reference(
    checkpoint: str | None, bundle: str | None
) -> tuple[Geometry, int, RunnerOpener, str]:
    if checkpoint is not None:
        source = read_checkpoint(checkpoint)
        geometry, width = source.config.model.geometry, source.config.model.policy_width
        specs: Mapping[str, GraphSpec] = graph_specs(geometry, width)
        return geometry, width, reference_opener(source, specs), "PyTorch in float32"
    assert bundle is not None
    opened = open_bundle(bundle)
    manifest = opened.manifest
    graph = manifest.graphs[IMAGE_ENCODER]
    words = f"the bundle's own graphs ({graph.runtime} {graph.precision}), no checkpoint was given"
    return (
        manifest.geometry,
        manifest.policy.width,
        lambda name: open_bundle_graph(opened, name, RunnerOptions()),
        words,
    )


def open_torch_stages(
    checkpoint: str, valid_region: ValidRegion | None = None
) -> SegmentationGraphs:
    """Open PyTorch's float32 modules in place of the graphs, on the CPU.

    Args:
        checkpoint: the weights.
        valid_region: which pictures the encoder shall take; None stands for any.
    """
    source = read_checkpoint(checkpoint)
    config = source.config.model
    specs = graph_specs(config.geometry, config.policy_width, valid_region=valid_region)
    model = load_segmentation_model(source)
    model.image_encoder.set_valid_region(valid_region)
    return SegmentationGraphs(
        {n: TorchRunner(m, specs[n], RunnerOptions()) for n, m in model.graph_modules().items()}
    )


def open_policy(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    library: str = "transformers",
    device: str = "cpu",
) -> Policy:
    """Open the policy of a checkpoint by a library that ``policy.availability`` names."""
    module = importlib.import_module(f"coprs_deploy.policy.{library}_policy")
    policy_class = getattr(module, f"{library.capitalize()}Policy")
    limits = checkpoint.config.policy_image
    opened: Policy = policy_class(
        checkpoint.policy_path,
        checkpoint.config.prompt,
        limits.min_pixels,
        limits.max_pixels,
        device=device,
        dtype=dtype,
    )
    return opened


def ask(policy: Policy, example: Example) -> PolicyResult:
    """Ask the policy about an example."""
    from coprs_deploy.policy import PolicyRequest, PolicyResult

    result = list(policy.stream(PolicyRequest(example.image, example.instruction)))[-1]
    assert isinstance(result, PolicyResult)
    return result


def scenes(count: int) -> list[Example]:
    """Draw held-out scenes with one question each, which has an answer."""
    from coprs_deploy.data.synthetic.examples import held_out_examples
    from coprs_deploy.data.synthetic.presets import PLAIN

    return held_out_examples(PLAIN, count, 0)


def _scene_inputs(checkpoint: Checkpoint, geometry: Geometry, count: int) -> Iterator[Values]:
    """Let the policy answer; a scene in which it names nothing is passed over."""
    with open_policy(checkpoint) as policy:
        for example in scenes(count):
            found = ask(policy, example).concentrations
            if not len(found):
                continue
            prepared = prepare_image(example.image, geometry)
            yield {
                "image": prepared.image,
                "concentration": found[-1:],
                "unpadded_size": prepared.unpadded_size,
                "original_size": np.array(prepared.original_size),
                "truth": np.any(example.masks, axis=0),
            }
