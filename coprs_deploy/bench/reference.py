"""Inputs of graphs and their outputs in PyTorch float32; the demo model's questions and policy.

The demo model gets held-out scenes with the concentrations that its own policy finds, and their
ground truth; any other model gets the random inputs of the equivalence check. Everything is written
once into a folder that all workers read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coprs_deploy.artifacts import write_json
from coprs_deploy.bench.case import Values, write_arrays
from coprs_deploy.bundle import open_bundle, read_manifest
from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.export.equivalence import reference_opener
from coprs_deploy.export.samples import RunnerOpener, sample_inputs
from coprs_deploy.images import PreparedImage, prepare_image, unpadded_size
from coprs_deploy.specs import (
    GRAPH_NAMES,
    IMAGE_ENCODER,
    Geometry,
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
    has_gt: bool,
    count: int,
    *,
    aspect_ratio: str = "",
) -> None:
    """Write ``0.safetensors`` and so on: inputs and float32 outputs of every graph.

    Files of an earlier run with the same weights are kept. Without a checkpoint, the bundle's own
    graphs are the reference. ``has_gt`` takes held-out scenes with their ground truth, else images
    are random, of one aspect ratio or of several.
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
        return
    for stale in out.glob("*.safetensors"):
        stale.unlink()
    geometry, width, opener, _ = open_reference(checkpoint, bundle)
    if has_gt:
        assert checkpoint is not None
        samples = list(_scene_inputs(read_checkpoint(checkpoint), geometry, count))
    else:
        drawn = sample_inputs(geometry, width, valid_region=_region(aspect_ratio, geometry))[:count]
        samples = [_input(sample.prepared, sample.concentration) for sample in drawn]
    for name in GRAPH_NAMES:
        with opener(name) as runner:
            for sample in samples:
                outputs = runner(**{t.name: sample[t.name] for t in runner.spec.inputs})
                sample.update({name: np.asarray(v.numpy()) for name, v in outputs.items()})
    for index, sample in enumerate(samples):
        write_arrays(out / f"{index}.safetensors", sample)
    write_json(made, complete)


def _region(aspect_ratio: str, geometry: Geometry) -> ValidRegion | None:
    if not aspect_ratio:
        return None
    width, height = parse_aspect_ratio(aspect_ratio)
    return ValidRegion((width, height), *unpadded_size(height, width, geometry.image_size))


def _input(prepared: PreparedImage, concentration: np.ndarray) -> Values:
    original_size, size = np.array(prepared.original_size), prepared.unpadded_size
    sizes = {"unpadded_size": size, "original_size": original_size}
    return {"image": prepared.image, "concentration": concentration, **sizes}


def _scene_inputs(checkpoint: Checkpoint, geometry: Geometry, count: int) -> Iterator[Values]:
    """Ask the policy; a scene in which it finds no target is skipped."""
    with open_policy(checkpoint) as policy:
        for example in scenes(count):
            concentrations = ask(policy, example).concentrations
            if len(concentrations):
                sample = _input(prepare_image(example.image, geometry), concentrations[-1:])
                yield sample | {"ground_truth": np.any(example.masks, axis=0)}


def open_reference(
    checkpoint: str | None, bundle: str | None
) -> tuple[Geometry, int, RunnerOpener, str]:
    """Return geometry, policy width, an opener of reference graphs, and a note for the report."""
    if checkpoint is not None:
        source = read_checkpoint(checkpoint)
        geometry, width = source.config.model.geometry, source.config.model.policy_hidden_size
        return geometry, width, reference_opener(source, graph_specs(geometry, width)), ""
    assert bundle is not None
    opened = open_bundle(bundle)
    manifest, options = opened.manifest, RunnerOptions()
    graph = manifest.graphs[IMAGE_ENCODER]
    own = f"the bundle's own graphs ({graph.runtime} {graph.precision})"
    note = f"against {own}, no checkpoint was given"
    width = manifest.policy.hidden_size
    return manifest.geometry, width, lambda name: open_bundle_graph(opened, name, options), note


def open_torch_graphs(
    checkpoint: str, valid_region: ValidRegion | None = None
) -> SegmentationGraphs:
    """Open PyTorch's float32 modules in place of the graphs, on the CPU."""
    source = read_checkpoint(checkpoint)
    config = source.config.model
    specs = graph_specs(config.geometry, config.policy_hidden_size, valid_region=valid_region)
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
    """Open the policy of a checkpoint with a library that ``policy.availability`` lists."""
    if library == "vllm":
        from coprs_deploy.policy.vllm_policy.policy import VllmPolicy as PolicyType
    else:
        from coprs_deploy.policy.transformers_policy import (  # type: ignore[assignment]
            TransformersPolicy as PolicyType,
        )

    limits = checkpoint.config.policy_image
    return PolicyType(
        checkpoint.policy_path,
        checkpoint.config.prompt,
        limits.min_pixels,
        limits.max_pixels,
        device=device,
        dtype=dtype,
    )


def ask(policy: Policy, example: Example) -> PolicyResult:
    """Ask the policy the question of an example."""
    from coprs_deploy.policy import PolicyRequest, PolicyResult

    result = list(policy.stream(PolicyRequest(example.image, example.instruction)))[-1]
    assert isinstance(result, PolicyResult)
    return result


def scenes(count: int) -> list[Example]:
    """Generate held-out scenes of the preset ``plain``, one question with an answer each."""
    from coprs_deploy.data.synthetic.examples import held_out_examples
    from coprs_deploy.data.synthetic.presets import PLAIN

    return held_out_examples(PLAIN, count, 0)
