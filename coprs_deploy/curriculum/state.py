"""What a run works on: policy, segmentation path, and the heads that are thrown away in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from coprs_deploy.checkpoint import (
    PolicyImageLimits,
    read_checkpoint,
)
from coprs_deploy.curriculum.auxiliary_heads import SceneHeads
from coprs_deploy.curriculum.recipe import TinyModel
from coprs_deploy.curriculum.scenes import attribute_sizes
from coprs_deploy.curriculum.tiny_policy import build_tiny_policy, prompt_template, tiny_config
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.models import SegmentationModel
from coprs_deploy.training.state import TrainingState, state_from_checkpoint

POSITION_SCALE = 0.1
"""Standard deviation of the image encoder's starting position embedding."""


TOKEN_SCALE = 0.5
"""Standard deviation of the mask decoder's starting tokens."""


def build_tiny_state(
    settings: TinyModel, preset: Preset, corpus: Callable[[], list[str]], seed: int
) -> TrainingState:
    """Build a small model with random weights or those it starts from; heads are always random.

    Args:
        settings: sizes, and what to start from.
        preset: the world of the scenes.
        corpus: texts to learn a tokenizer from; not asked for where a checkpoint brings one.
        seed: of the random weights.

    Raises:
        ValueError: the model's image sizes are not those of the scenes, or the checkpoint that it
            starts from has other sizes.
        CheckpointError: that checkpoint cannot be used.
    """
    geometry = settings.segmentation.geometry
    for name, size in (
        ("model.policy.image_size", settings.policy.image_size),
        ("model.segmentation.sam.geometry.image_size", geometry.image_size),
    ):
        if size != preset.image_size:
            raise ValueError(
                f"{name} is {size}; the scenes of the tier {preset.name!r} have {preset.image_size}"
            )
    sizes, width = attribute_sizes(preset), settings.policy.hidden_size
    policy = None if settings.start else build_tiny_policy(settings.policy, corpus(), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if policy is None:
            workbench = _start_from(settings)
        else:
            segmentation = SegmentationModel(settings.segmentation)
            initialize_segmentation(segmentation)
            area = settings.policy.image_size**2
            limits = PolicyImageLimits(area, area)
            workbench = TrainingState(policy, segmentation, nn.Module(), limits)
        heads = SceneHeads(width, geometry.out_chans, sizes, settings.policy.grid_size)
    return replace(workbench, heads=heads)


def _start_from(settings: TinyModel) -> TrainingState:
    """Load the weights that a small model starts with; its sizes must be those of the recipe."""
    checkpoint = read_checkpoint(settings.start)
    workbench = state_from_checkpoint(checkpoint)
    found = workbench.policy.model.config
    wanted = tiny_config(settings.policy, workbench.policy.tokenizer)
    other = [
        f"{part}.{name}"
        for part, names in _POLICY_SIZES.items()
        for name in names
        if getattr(getattr(found, part), name) != getattr(getattr(wanted, part), name)
    ]
    if checkpoint.config.model != settings.segmentation:
        other.append("the segmentation path")
    if checkpoint.config.prompt != prompt_template(settings.policy):
        other.append("the prompt")
    if other:
        raise ValueError(
            f"model.start: {checkpoint.path} differs from the recipe in {', '.join(other)}; give "
            "the sizes and the prompt that it was trained with"
        )
    return workbench


_POLICY_SIZES = {
    "text_config": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rope_parameters",
    ),
    "vision_config": ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size"),
}
"""Fields of a policy's configuration in which a checkpoint and a recipe must agree."""


def initialize_segmentation(model: SegmentationModel) -> None:
    """Draw the starting weights that SAM's own modules leave at zero or too large."""
    with torch.no_grad():
        nn.init.normal_(model.image_encoder.pos_embed, std=POSITION_SCALE)
        for name, weight in model.named_parameters():
            if name.endswith(("mask_tokens.weight", "iou_token.weight")):
                nn.init.normal_(weight, std=TOKEN_SCALE)
        for projection in (model.prior.q_proj, model.prior.k_proj):
            nn.init.normal_(projection.weight, std=1.5 * projection.weight.shape[1] ** -0.5)
