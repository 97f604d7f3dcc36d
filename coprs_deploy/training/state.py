"""Training state: policy, segmentation path and auxiliary heads, loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coprs_deploy.bundle import PolicyQuantization
from coprs_deploy.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    PolicyImageLimits,
    load_segmentation_model,
    write_checkpoint,
)
from coprs_deploy.models import SegmentationModel
from coprs_deploy.policy.compressed_weights import require_float_weights
from coprs_deploy.policy.policy_size import check_policy_size
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
    """Policy in memory: transformers model, tokenizer and image processor, and its prompt.

    ``quantization`` says how its weights were quantized; None if they were not.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    prompt: PromptTemplate
    quantization: PolicyQuantization | None = None

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the transformers directory.

        The configuration keeps the dtype of the training: weights stored in half precision compute
        in full precision.
        """
        with without_progress_bars():
            self.model.save_pretrained(directory, state_dict=dict(weights))
        config = deepcopy(self.model.config)
        config.dtype = self.model.dtype
        for part in (config.text_config, config.vision_config):
            part.dtype = self.model.dtype
        config.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)


@dataclass
class TrainingState:
    """The parts of a model in training.

    ``auxiliary_heads`` are used in training only; a model that starts from a checkpoint has none.
    ``trained`` has the names of the weights that a stage of the run trains; None stands for all.
    """

    policy: PolicyParts
    segmentation: SegmentationModel
    auxiliary_heads: nn.Module
    image_limits: PolicyImageLimits
    trained: set[str] | None = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return all weights by part."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load weights; names must match exactly."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def save_checkpoint(
        self,
        path: Path,
        dtype: str,
        provenance: dict[str, Any],
        overwrite: bool = False,
        policy_weights: Mapping[str, Tensor] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint directory; the weights in memory stay as they are.

        Args:
            path: the directory.
            dtype: dtype of the trained weights, by torch's name; others are stored without loss.
            provenance: origin of the weights, for information only.
            overwrite: whether an existing checkpoint is replaced.
            policy_weights: weights under the names of the plain policy; None takes its own.
        """
        policy = self.policy.model.state_dict() if policy_weights is None else policy_weights
        config = CheckpointConfig(
            self.segmentation.config,
            self.policy.prompt,
            self.image_limits,
            provenance,
            self.policy.quantization,
        )
        return write_checkpoint(
            path,
            config,
            self._stored("segmentation", self.segmentation.state_dict(), dtype),
            lambda folder: self.policy.save(folder, self._stored("policy", policy, dtype)),
            overwrite,
        )

    def add_trained(self, is_trained: Callable[[str, str], bool] | None = None) -> None:
        """Add the weights of a stage to :attr:`trained`: by default those that need a gradient."""
        names = {
            f"{part}.{name}"
            for part, module in self._parts().items()
            for name, weight in module.state_dict(keep_vars=True).items()
            if weight.requires_grad and (is_trained is None or is_trained(part, name))
        }
        self.trained = names | (self.trained or set())

    def _stored(self, part: str, weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
        """Convert the weights of a part for a checkpoint; shared ones stay shared."""
        half, stored, known = getattr(torch, dtype), dict[str, Tensor](), dict[Any, Tensor]()
        for name, weight in weights.items():
            key = (weight.data_ptr(), weight.shape)
            if key not in known:
                is_kept = self.trained is not None and f"{part}.{name}" not in self.trained
                target = _exact_dtype(weight, half) if is_kept else half
                target = target if weight.is_floating_point() else weight.dtype
                known[key] = weight.detach().to("cpu", target)
            stored[name] = known[key]
        return stored

    def _parts(self) -> dict[str, nn.Module]:
        return {
            "policy": self.policy.model,
            "segmentation": self.segmentation,
            "auxiliary_heads": self.auxiliary_heads,
        }


def _exact_dtype(weight: Tensor, preferred: torch.dtype) -> torch.dtype:
    """Return the smallest dtype that stores a weight without loss, ``preferred`` if it does."""
    for dtype in (preferred, torch.float16, torch.bfloat16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return dtype
    return weight.dtype


def state_from_checkpoint(checkpoint: Checkpoint) -> TrainingState:
    """Load a checkpoint for training, in float32 and without auxiliary heads.

    Raises:
        CheckpointError: the policy is quantized.
        PolicyError: the policy's configuration does not belong to its weights.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    path: Path = checkpoint.policy_path
    require_float_weights(path, "training")
    check_policy_size(path)
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


def vision_tower(policy: Any) -> nn.Module:
    """Return the vision tower of a policy of either family."""
    tower: nn.Module = getattr(policy.model, "visual", None) or policy.model.vision_tower
    return tower
