"""Shared parts of the stages on generated scenes: model, scenes, prompt and evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from coprs_deploy.curriculum.auxiliary_heads import AuxiliaryHeads
from coprs_deploy.curriculum.evaluation import SceneEvaluator
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import QuestionPacker
from coprs_deploy.curriculum.scenes import SceneSource
from coprs_deploy.training.state import TrainingState


@dataclass(frozen=True)
class CurriculumContext:
    """Shared parts of the stages of one run.

    Attributes:
        state: the model.
        training: training scenes.
        held_out: held-out scenes.
        packer: layout of questions behind an image.
        evaluator: evaluation of the model on held-out scenes.
        dtype: dtype of matrix products.
    """

    state: TrainingState
    training: SceneSource
    held_out: SceneSource
    packer: QuestionPacker
    evaluator: SceneEvaluator
    dtype: torch.dtype

    @property
    def auxiliary_heads(self) -> AuxiliaryHeads:
        """Auxiliary heads of the model."""
        heads = self.state.auxiliary_heads
        assert isinstance(heads, AuxiliaryHeads), "a curriculum needs its auxiliary heads"
        return heads

    def forward(self, torch_compile: bool, policy: Any = None) -> PackedForward:
        """Build the forward pass for training, of the policy or of another one of its sizes."""
        image_size = self.training.preset.image_size
        model = policy or self.state.policy.model
        return PackedForward(model, image_size, self.dtype, torch_compile)
