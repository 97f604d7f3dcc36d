"""What dropping the padding does to the shipped model's masks, beside the truth.

    python -m coprs_deploy.benchmarks.dropped_padding          the figures of docs/cpu-speed.md

Its scenes are square, so their upper nine sixteenths are taken where they hold the target, asked
with what the policy says of the whole scene.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from coprs_deploy import demo
from coprs_deploy.benchmarks.inputs import ask, open_policy, open_torch_stages, scenes
from coprs_deploy.benchmarks.mask_judge import mask_agreement
from coprs_deploy.benchmarks.policy_judge import last_mask
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.evaluation.metrics import count_pixels, iou, union
from coprs_deploy.images import prepare_image

ASPECT = (16, 9)
COUNT = 128

DRAWN = 4
"""Scenes that are drawn for each that is wanted; in a third of them the target lies up there."""


def judge_dropped_padding(count: int) -> dict[str, float]:
    """Compare the masks of PyTorch's encoder with and without padding, in float32.

    Args:
        count: how many scenes.

    Returns:
        The number of scenes, mean and smallest IoU of the two masks, and mean IoU with the truth
        and P@0.5 with padding and without.
    """
    source = read_checkpoint(demo.CHECKPOINT)
    geometry = source.config.model.geometry
    valid_region = source.config.model.sam.valid_region(ASPECT, drops_padding=True)
    height, place = valid_region.height, str(demo.CHECKPOINT)
    upper = (e for e in scenes(DRAWN * count) if not e.masks[:, height:].any())
    agreement: list[float] = []
    truth: list[tuple[float, float]] = []
    with (
        open_policy(source) as policy,
        open_torch_stages(place) as padded,
        open_torch_stages(place, valid_region) as dropped,
    ):
        for example in islice(upper, count):
            concentrations = ask(policy, example).concentrations
            prepared = prepare_image(np.ascontiguousarray(example.image[:height]), geometry)
            with_padding, without = (
                last_mask(stages, stages.encode(prepared), concentrations, prepared, geometry)
                for stages in (padded, dropped)
            )
            target = union(example.masks)[:height]
            agreement.append(mask_agreement(without, with_padding))
            truth.append(
                (
                    iou(count_pixels(with_padding, target), empty=0.0),
                    iou(count_pixels(without, target), empty=0.0),
                )
            )
    ious = np.array(truth)
    return {
        "scenes": len(agreement),
        "iou": float(np.mean(agreement)),
        "iou_worst": float(np.min(agreement)),
        "truth_iou_with_padding": float(ious[:, 0].mean()),
        "truth_iou_without": float(ious[:, 1].mean()),
        "precision_at_half_with_padding": float((ious[:, 0] > 0.5).mean()),
        "precision_at_half_without": float((ious[:, 1] > 0.5).mean()),
    }


if __name__ == "__main__":
    for name, value in judge_dropped_padding(COUNT).items():
        print(f"{name.replace('_', ' '):32}{value:.4g}")
