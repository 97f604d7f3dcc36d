"""The float32 reference of a model, its policy, and held-out scenes with its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.bench.case import Values
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.graphs import masks_at_original_size
from coprs_deploy.evaluation.metrics import union
from coprs_deploy.export.equivalence import reference_opener
from coprs_deploy.export.samples import RunnerOpener
from coprs_deploy.images import prepare_image
from coprs_deploy.specs import GRAPH_NAMES, IMAGE_ENCODER, Geometry, graph_specs

if TYPE_CHECKING:
    from coprs_deploy.data.examples import Example
    from coprs_deploy.policy import Policy, PolicyResult


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
        return Reference(geometry, width, reference_opener(source, graph_specs(geometry, width)))
    assert bundle is not None
    opened, options = open_bundle(bundle), RunnerOptions()
    graph = opened.manifest.graphs[IMAGE_ENCODER]
    own = f"the bundle's own graphs ({graph.runtime} {graph.precision})"
    return Reference(
        opened.manifest.geometry,
        opened.manifest.policy.hidden_size,
        lambda name: open_bundle_graph(opened, name, options),
        f"against {own}, no checkpoint was given",
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
    from coprs_deploy.policy import PolicyRequest, PolicyResult

    result = list(policy.stream(PolicyRequest(example.image, example.instruction)))[-1]
    assert isinstance(result, PolicyResult)
    return result


def scenes(count: int, side: int | None = None) -> list[Example]:
    """Generate held-out scenes of the preset ``plain``, one question with an answer each.

    ``side`` enlarges them to this side in pixels.
    """
    from coprs_deploy.data.synthetic.examples import held_out_examples
    from coprs_deploy.data.synthetic.presets import PLAIN

    examples = held_out_examples(PLAIN, count, 0)
    return examples if side is None else [_enlarged(example, side) for example in examples]


def _enlarged(example: Example, side: int) -> Example:
    def resized(array: NDArray[Any], resampling: Image.Resampling) -> NDArray[Any]:
        return np.asarray(Image.fromarray(array).resize((side, side), resampling))

    masks = [resized(mask, Image.Resampling.NEAREST) for mask in example.masks]
    image = resized(example.image, Image.Resampling.BICUBIC)
    return replace(example, image=image, masks=np.stack(masks))


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
            found[f"{index}.concentration"] = vectors
            found[f"{index}.mask"] = np.zeros(example.image.shape[:2], np.bool_)
            found[f"{index}.ground_truth"] = union(example.masks)
            if len(vectors):
                prepared = prepare_image(example.image, reference.geometry)
                embedding, size = graphs.encode(prepared), prepared.unpadded_size
                _, chunks = graphs.priors_and_masks(embedding, vectors[-1:], size)
                (mask,) = masks_at_original_size(chunks, 1, prepared, reference.geometry)
                found[f"{index}.mask"] = mask
    return found
