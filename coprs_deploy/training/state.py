"""What a run works on: policy, segmentation path, and the heads that are thrown away in the end."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coprs_deploy.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    PolicyImageLimits,
    load_segmentation_model,
    write_checkpoint,
)
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.progress_bars import without_progress_bars
from coprs_deploy.prompts import PromptTemplate

UNUSED_PARTS = (
    "prompt_encoder.point_embeddings",
    "prompt_encoder.not_a_point_embed",
    "prompt_encoder.no_mask_embed",
    "mask_decoder.iou_prediction_head",
    *(f"mask_decoder.output_hypernetworks_mlps.{i}" for i in (1, 2, 3)),
)
"""Parameters that SAM has and CoPRS never calls: nothing can be learned there."""


@dataclass
class TrainingState:
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


def state_from_checkpoint(checkpoint: Checkpoint) -> TrainingState:
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
    return TrainingState(parts, segmentation, nn.Module(), checkpoint.config.policy_image)


def freeze_unused(model: SegmentationModel) -> None:
    """Take the parameters out of training that no stage calls."""
    for name, weight in model.named_parameters():
        if name.startswith(UNUSED_PARTS):
            weight.requires_grad_(False)


@dataclass(frozen=True)
class PolicyParts:
    """A policy in memory with everything that its directory needs.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        prompt: the prompt that it is trained with.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    prompt: PromptTemplate

    def save(self, directory: Path, dtype: str) -> None:
        """Write the transformers directory.

        Args:
            directory: an existing empty one.
            dtype: of the stored weights, as torch names it. The configuration keeps the dtype that
                the policy was trained in: weights stored in half are computed with in full.
        """
        import torch

        trained_dtype = self.model.dtype
        self.model.to(getattr(torch, dtype))
        try:
            with without_progress_bars():
                self.model.save_pretrained(directory)
        finally:
            self.model.to(trained_dtype)
        config = deepcopy(self.model.config)
        config.dtype = trained_dtype
        for part in (config.text_config, config.vision_config):
            part.dtype = trained_dtype
        config.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)
