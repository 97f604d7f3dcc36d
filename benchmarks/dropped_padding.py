"""Effect of dropped padding on the demo model's masks, against the ground truth.

    python benchmarks/dropped_padding.py

The demo model's scenes are square, so their upper nine sixteenths are taken where they hold the
target, with what the policy says of the whole scene.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from coprs_deploy import demo
from coprs_deploy.bench.accuracy import ask, mask_agreement, open_policy, scenes
from coprs_deploy.checkpoint import Checkpoint, read_checkpoint
from coprs_deploy.engines import SegmentationGraphs
from coprs_deploy.engines.graphs import masks_at_original_size
from coprs_deploy.evaluation.metrics import EMPTY_IOU, count_pixels, giou, precision_at, union
from coprs_deploy.evaluation.rows import MaskCounts
from coprs_deploy.export.equivalence import reference_opener
from coprs_deploy.images import PreparedImage, prepare_image
from coprs_deploy.specs import GRAPH_NAMES, Geometry, ValidRegion, graph_specs

ASPECT_RATIO = (16, 9)

SCENES_PER_EXAMPLE = 4
"""Scenes that are generated for each that is used; in a third of them the target lies up there."""


def evaluate_dropped_padding(count: int) -> dict[str, float]:
    """Compare the masks of PyTorch's encoder with and without padding, in float32.

    Args:
        count: number of scenes.

    Returns:
        The number of scenes, mean and smallest IoU of the two masks, and gIoU and P@0.5 with
        padding and without.
    """
    source = read_checkpoint(demo.CHECKPOINT)
    geometry = source.config.model.geometry
    valid_region = source.config.model.sam.valid_region(ASPECT_RATIO, drops_padding=True)
    height = valid_region.height
    upper = (e for e in scenes(SCENES_PER_EXAMPLE * count) if not e.masks[:, height:].any())
    agreement = []
    counts: dict[str, list[MaskCounts]] = {"with_padding": [], "without_padding": []}
    with (
        open_policy(source) as policy,
        open_graphs(source) as padded,
        open_graphs(source, valid_region) as dropped,
    ):
        for example in islice(upper, count):
            concentrations = ask(policy, example).concentrations
            prepared = prepare_image(np.ascontiguousarray(example.image[:height]), geometry)
            with_padding, without = (
                last_mask(graphs, concentrations, prepared, geometry)
                for graphs in (padded, dropped)
            )
            target = union(example.masks)[:height]
            agreement.append(mask_agreement(without, with_padding))
            counts["with_padding"].append(count_pixels(with_padding, target))
            counts["without_padding"].append(count_pixels(without, target))
    ious = {"mask_iou_mean": float(np.mean(agreement)), "mask_iou_min": float(np.min(agreement))}
    metrics = {"scenes": len(agreement), **ious}
    for name, pairs in counts.items():
        metrics[f"giou_{name}"] = giou(pairs, empty=EMPTY_IOU)
        metrics[f"precision_at_50_{name}"] = precision_at(pairs, 0.5, empty=EMPTY_IOU)
    return metrics


def open_graphs(source: Checkpoint, valid_region: ValidRegion | None = None) -> SegmentationGraphs:
    """Open PyTorch's float32 modules, for all images or for a valid region."""
    config = source.config.model
    specs = graph_specs(config.geometry, config.policy_hidden_size, valid_region=valid_region)
    open_graph = reference_opener(source, specs)
    return SegmentationGraphs({name: open_graph(name) for name in GRAPH_NAMES})


def last_mask(
    graphs: SegmentationGraphs,
    concentrations: NDArray[np.float32],
    prepared: PreparedImage,
    geometry: Geometry,
) -> NDArray[np.bool_]:
    """Segment the last target of (N, D) concentrations: (H, W) bool, empty without a target."""
    if not len(concentrations):
        return np.zeros(prepared.original_size, np.bool_)
    embedding = graphs.encode(prepared)
    _, chunks = graphs.priors_and_masks(embedding, concentrations[-1:], prepared.unpadded_size)
    mask: NDArray[np.bool_] = masks_at_original_size(chunks, 1, prepared, geometry)[0]
    return mask


def main(arguments: Sequence[str]) -> int:
    """Print the metrics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=128, help="number of scenes (default: 128)")
    for name, value in evaluate_dropped_padding(parser.parse_args(arguments).scenes).items():
        print(f"{name:32}{value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
