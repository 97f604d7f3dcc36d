"""Student and teacher of a distillation: initial weights, and what becomes of the teacher's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from coprs_deploy.checkpoint import Checkpoint, load_segmentation_model
from coprs_deploy.model_config import SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.models.sam_encoder import SamImageEncoder
from coprs_deploy.training.distillation.recipe import DistilledModel
from coprs_deploy.training.state import PolicyParts, TrainingState

POSITION_SCALE = 0.1
"""Initial standard deviation of the position embedding of a student of SAM's architecture."""

ENCODER_PREFIX = "image_encoder."


@dataclass(frozen=True)
class StoredPolicy(PolicyParts):
    """Policy that a distillation neither loads nor changes: its files are copied.

    Attributes:
        source: its directory.
    """

    source: Path = Path()

    def save(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Copy the policy's files."""
        shutil.copytree(self.source, directory, dirs_exist_ok=True)


def student_config(model: DistilledModel, teacher: Checkpoint) -> SegmentationConfig:
    """Return the sizes of the student.

    Raises:
        ValueError: the encoder's embedding cannot have the size of the teacher's.
    """
    config = teacher.config.model
    return msgspec.structs.replace(config, sam=model.student(config.sam))


def build_student(
    model: DistilledModel, checkpoint: Checkpoint, seed: int
) -> tuple[TrainingState, nn.Module]:
    """Build the student, and load the teacher's image encoder.

    Everything but the student's encoder is the teacher's, frozen. Of the encoder, those layers
    start from the teacher's that follow the change to the embedding's channels, where they have
    the same names and shapes; the rest is random.

    Returns:
        The training state, and the teacher's image encoder, frozen, in evaluation mode.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: the encoder's embedding cannot have the size of the teacher's.
    """
    teacher = load_segmentation_model(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = SegmentationModel(student_config(model, checkpoint))
        encoder = student.image_encoder
        if isinstance(encoder, SamImageEncoder):
            nn.init.normal_(encoder.pos_embed, std=POSITION_SCALE)
    weights, own = teacher.state_dict(), student.state_dict()
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(ENCODER_PREFIX)
        or (
            name.startswith(f"{ENCODER_PREFIX}neck.")
            and name in own
            and own[name].shape == tensor.shape
        )
    }
    student.load_state_dict(own | kept)
    config = checkpoint.config
    policy = StoredPolicy(
        nn.Module(), None, None, config.prompt, config.policy_quantization, checkpoint.policy_path
    )
    state = TrainingState(policy, student, nn.Module(), config.policy_image)
    student.requires_grad_(False)
    student.image_encoder.requires_grad_(True)
    state.add_trained()
    return state, teacher.image_encoder
