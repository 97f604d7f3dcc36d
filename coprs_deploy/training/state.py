"""Training state: policy, segmentation path and auxiliary heads, loaded from a checkpoint."""

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
"""Parameters that SAM has and CoPRS never uses."""


@dataclass(frozen=True)
class PolicyParts:
    """Policy in memory: transformers model, tokenizer and image processor, and its prompt."""

    model: Any
    tokenizer: Any
    image_processor: Any
    prompt: PromptTemplate

    def save(self, directory: Path, dtype: str) -> None:
        """Write the transformers directory, with weights in a dtype that torch names ``dtype``.

        The configuration keeps the dtype of the training: weights stored in half precision compute
        in full precision.
        """
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


@dataclass
class TrainingState:
    """The parts of a model in training.

    ``auxiliary_heads`` are used in training only; a model that starts from a checkpoint has none.
    """

    policy: PolicyParts
    segmentation: SegmentationModel
    auxiliary_heads: nn.Module
    image_limits: PolicyImageLimits

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return all weights by part."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load weights; names must match exactly."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def save_checkpoint(
        self, path: Path, dtype: str, provenance: dict[str, Any], overwrite: bool = False
    ) -> Checkpoint:
        """Write a checkpoint directory, with weights in a dtype that torch names ``dtype``."""
        tensors = {
            name: tensor.detach().to("cpu", getattr(torch, dtype))
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
            "auxiliary_heads": self.auxiliary_heads,
        }


def state_from_checkpoint(checkpoint: Checkpoint) -> TrainingState:
    """Load a checkpoint for training, in float32 and without auxiliary heads."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    path: Path = checkpoint.policy_path
    with without_progress_bars():
        policy = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    for name in ("is_local", "local_files_only"):  # added by the reader, not part of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    parts = PolicyParts(policy, tokenizer, processor, checkpoint.config.prompt)
    segmentation = load_segmentation_model(checkpoint)
    return TrainingState(parts, segmentation, nn.Module(), checkpoint.config.policy_image)


def freeze_unused(model: SegmentationModel) -> None:
    """Freeze the parameters that CoPRS never uses."""
    for name, weight in model.named_parameters():
        if name.startswith(UNUSED_PARTS):
            weight.requires_grad_(False)
