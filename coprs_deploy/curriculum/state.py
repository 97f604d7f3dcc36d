"""Training state of a tiny model: initial weights, random or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from coprs_deploy.checkpoint import PolicyImageLimits, read_checkpoint
from coprs_deploy.curriculum.auxiliary_heads import AuxiliaryHeads
from coprs_deploy.curriculum.recipe import TinyModel
from coprs_deploy.curriculum.scenes import attribute_values
from coprs_deploy.curriculum.tiny_policy import build_tiny_policy, prompt_template, tiny_config
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.models import SegmentationModel
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.training.state import TrainingState, state_from_checkpoint

POSITION_SCALE = 0.1
"""Initial standard deviation of the image encoder's position embedding."""

TOKEN_SCALE = 0.5
"""Initial standard deviation of the mask decoder's tokens."""

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
"""Fields of a policy's configuration in which checkpoint and recipe must agree."""


def build_tiny_state(
    settings: TinyModel, preset: Preset, corpus: Callable[[], list[str]], seed: int
) -> TrainingState:
    """Build a tiny model from random weights or a checkpoint; auxiliary heads are always random.

    Args:
        settings: sizes and initial checkpoint of the model.
        preset: difficulty preset of the scenes.
        corpus: texts to train a tokenizer on; not called with an initial checkpoint.
        seed: seed of the random weights.

    Raises:
        ValueError: image sizes of model and scenes differ, or the initial checkpoint has other
            sizes.
        CheckpointError: the initial checkpoint cannot be used.
    """
    geometry = settings.segmentation.geometry
    for name, size in (
        ("model.policy.image_size", settings.policy.image_size),
        ("model.segmentation.sam.geometry.image_size", geometry.image_size),
    ):
        if size != preset.image_size:
            raise ValueError(
                f"{name} is {size}; accepted for the preset {preset.name!r}: {preset.image_size}"
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if settings.init_from:
            state = _load_initial(settings)
        else:
            policy = build_tiny_policy(settings.policy, corpus(), seed)
            segmentation = SegmentationModel(settings.segmentation)
            initialize_segmentation(segmentation)
            area = settings.policy.image_size**2
            limits = PolicyImageLimits(area, area)
            state = TrainingState(policy, segmentation, nn.Module(), limits)
        heads = AuxiliaryHeads(
            settings.policy.hidden_size,
            geometry.out_chans,
            {name: len(values) for name, values in attribute_values(preset).items()},
            settings.policy.grid_size,
        )
    return replace(state, auxiliary_heads=heads)


def _load_initial(settings: TinyModel) -> TrainingState:
    """Load the initial checkpoint; its sizes must be those of the recipe."""
    checkpoint = read_checkpoint(settings.init_from)
    state = state_from_checkpoint(checkpoint)
    found = state.policy.model.config
    expected = tiny_config(settings.policy, state.policy.tokenizer)
    differing = [
        f"{part}.{name}"
        for part, names in _POLICY_SIZES.items()
        for name in names
        if getattr(getattr(found, part), name) != getattr(getattr(expected, part), name)
    ]
    if checkpoint.config.model != settings.segmentation:
        differing.append("the segmentation path")
    if checkpoint.config.prompt != prompt_template(settings.policy):
        differing.append("the prompt")
    if differing:
        raise ValueError(
            f"model.init_from: {checkpoint.path} differs from the recipe in "
            f"{', '.join(differing)}; use the sizes and the prompt of its training"
        )
    return state


def initialize_segmentation(model: SegmentationModel) -> None:
    """Initialize the weights that SAM's modules leave at zero or too large."""
    with torch.no_grad():
        if isinstance(model.image_encoder, SamImageEncoder):
            nn.init.normal_(model.image_encoder.pos_embed, std=POSITION_SCALE)
        for name, weight in model.named_parameters():
            if name.endswith(("mask_tokens.weight", "iou_token.weight")):
                nn.init.normal_(weight, std=TOKEN_SCALE)
        for projection in (model.prior.q_proj, model.prior.k_proj):
            nn.init.normal_(projection.weight, std=1.5 * projection.weight.shape[1] ** -0.5)
