"""What the phases on scenes share: the model, the scenes, the prompt, and the judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coprs_deploy.curriculum.auxiliary_heads import SceneHeads
from coprs_deploy.curriculum.evaluation import SceneEvaluator
from coprs_deploy.curriculum.packed_forward import PackedForward
from coprs_deploy.curriculum.packing import QuestionPacker
from coprs_deploy.curriculum.scenes import SceneSource
from coprs_deploy.training.state import TrainingState


@dataclass(frozen=True)
class CurriculumContext:
    """One run's parts.

    Attributes:
        workbench: the model.
        training: scenes to learn from.
        held_out: scenes to be judged on.
        packer: the prompt.
        judge: compares answers on held-out scenes with the truth.
        image_size: side of the images in pixels.
        dtype: of products.
    """

    workbench: TrainingState
    training: SceneSource
    held_out: SceneSource
    packer: QuestionPacker
    judge: SceneEvaluator
    image_size: int
    dtype: torch.dtype

    @property
    def heads(self) -> SceneHeads:
        """The throw-away heads."""
        assert isinstance(self.workbench.heads, SceneHeads), "scenes need their heads"
        return self.workbench.heads

    def forward(self, compile_blocks: bool) -> PackedForward:
        """Make the policy's forward pass for training."""
        model = self.workbench.policy.model
        return PackedForward(model, self.image_size, self.dtype, compile_blocks)
