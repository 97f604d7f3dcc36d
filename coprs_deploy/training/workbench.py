"""What a run works on: policy, segmentation path, and the heads that are thrown away in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coprs_deploy.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    PolicyImageLimits,
    load_segmentation_model,
    read_checkpoint,
    write_checkpoint,
)
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.training.heads import SceneHeads
from coprs_deploy.training.recipe import SmallModel
from coprs_deploy.training.scene_source import attribute_sizes
from coprs_deploy.training.scenes.tiers import Tier
from coprs_deploy.training.small_policy import (
    PolicyParts,
    build_small_policy,
    prompt_template,
    small_config,
)

POSITION_SCALE = 0.1
"""Standard deviation of the image encoder's starting position embedding."""

TOKEN_SCALE = 0.5
"""Standard deviation of the mask decoder's starting tokens."""

UNUSED_PARTS = (
    "prompt_encoder.point_embeddings",
    "prompt_encoder.not_a_point_embed",
    "prompt_encoder.no_mask_embed",
    "mask_decoder.iou_prediction_head",
    *(f"mask_decoder.output_hypernetworks_mlps.{i}" for i in (1, 2, 3)),
)
"""Parameters that SAM has and CoPRS never calls: nothing can be learned there."""


@dataclass
class Workbench:
    """The parts of a model in training.

    Attributes:
        policy: the policy with tokenizer, image processor and prompt.
        segmentation: the segmentation path.
        heads: throw-away heads; without any for a model that starts from a checkpoint.
        image_limits: how large an image the policy sees.
    """

    policy: PolicyParts
    segmentation: SegmentationModel
    heads: nn.Module
    image_limits: PolicyImageLimits

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return every weight, by part."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take weights back; names must match exactly."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def save_checkpoint(
        self, path: Path, dtype: str, provenance: dict[str, Any], overwrite: bool = False
    ) -> Checkpoint:
        """Write the checkpoint directory that ``coprs-deploy export`` takes.

        Args:
            path: the directory.
            dtype: of the stored weights, as torch names it.
            provenance: where the weights come from, for people.
            overwrite: whether a checkpoint that stands there may be replaced.
        """
        wanted = getattr(torch, dtype)
        tensors = {
            name: tensor.detach().to("cpu", wanted)
            for name, tensor in self.segmentation.state_dict().items()
        }
        config = CheckpointConfig(
            self.segmentation.config, self.policy.prompt, self.image_limits, provenance
        )
        return write_checkpoint(
            path, config, tensors, lambda folder: self.policy.save(folder, dtype), overwrite
        )

    def _parts(self) -> dict[str, nn.Module]:
        return {
            "policy": self.policy.model,
            "segmentation": self.segmentation,
            "heads": self.heads,
        }


def workbench_from_checkpoint(checkpoint: Checkpoint) -> Workbench:
    """Load every part of a checkpoint for training, in float32; there are no throw-away heads."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    path: Path = checkpoint.policy_path
    with without_progress_bars():
        policy = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    for name in ("is_local", "local_files_only"):  # how it was read, not what it is
        tokenizer.init_kwargs.pop(name, None)
    parts = PolicyParts(policy, tokenizer, processor, checkpoint.config.prompt)
    segmentation = load_segmentation_model(checkpoint)
    return Workbench(parts, segmentation, nn.Module(), checkpoint.config.policy_image)


def build_small_workbench(
    settings: SmallModel, tier: Tier, corpus: Callable[[], list[str]], seed: int
) -> Workbench:
    """Build a small model with random weights or those it starts from; heads are always random.

    Args:
        settings: sizes, and what to start from.
        tier: the world of the scenes.
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
        if size != tier.image_size:
            raise ValueError(
                f"{name} is {size}; the scenes of the tier {tier.name!r} have {tier.image_size}"
            )
    sizes, width = attribute_sizes(tier), settings.policy.width
    policy = None if settings.start else build_small_policy(settings.policy, corpus(), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if policy is None:
            workbench = _start_from(settings)
        else:
            segmentation = SegmentationModel(settings.segmentation)
            initialize_segmentation(segmentation)
            area = settings.policy.image_size**2
            limits = PolicyImageLimits(area, area)
            workbench = Workbench(policy, segmentation, nn.Module(), limits)
        heads = SceneHeads(width, geometry.embedding_channels, sizes, settings.policy.grid_size)
    return replace(workbench, heads=heads)


def _start_from(settings: SmallModel) -> Workbench:
    """Load the weights that a small model starts with; its sizes must be those of the recipe."""
    checkpoint = read_checkpoint(settings.start)
    workbench = workbench_from_checkpoint(checkpoint)
    found = workbench.policy.model.config
    wanted = small_config(settings.policy, workbench.policy.tokenizer)
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


def freeze_unused(model: SegmentationModel) -> None:
    """Take the parameters out of training that no stage calls."""
    for name, weight in model.named_parameters():
        if name.startswith(UNUSED_PARTS):
            weight.requires_grad_(False)
