"""Recipes that distill an image encoder from that of a checkpoint, the teacher.

The result is the teacher's checkpoint with another image encoder: policy, prior and mask decoder
stay as they are. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from coprs_deploy.encoder_config import ENCODERS, LightEncoderConfig
from coprs_deploy.model_config import SamConfig
from coprs_deploy.specs import Record
from coprs_deploy.training.recipe import RunSettings
from coprs_deploy.training.settings import (
    MASK_METRICS,
    Count,
    Positive,
    SegmentationLossWeights,
    StageSettings,
    Weight,
)

EMBEDDING_ERROR = "embedding_error"
EMBEDDING_COSINE = "embedding_cosine"

AGREEMENT = "agreement_"
"""Start of the names of metrics that compare the student's masks with the teacher's."""

TEACHER = "teacher_"
"""Start of the names of the teacher's own metrics."""


class VitConfig(Record, frozen=True, tag_field="family", tag="vit"):
    """Sizes of a student with the architecture of SAM's own encoder; names are SAM's.

    Attributes:
        encoder_embed_dim: token width.
        encoder_depth: number of transformer blocks.
        encoder_num_heads: attention heads per block.
        encoder_global_attn_indexes: indexes of the blocks with global attention.
        window_size: side of an attention window in cells.
        mlp_ratio: hidden width of the MLP over the token width.
        use_rel_pos: whether attention adds SAM's decomposed relative positions.
        patch_size: side of a patch in pixels, which decides the input size; 0 for the teacher's.
    """

    encoder_embed_dim: int = 192
    encoder_depth: int = 6
    encoder_num_heads: int = 3
    encoder_global_attn_indexes: tuple[int, ...] = (1, 3, 5)
    window_size: int = 14
    mlp_ratio: float = 4.0
    use_rel_pos: bool = True
    patch_size: Count = 0


class DistilledModel(Record, frozen=True, tag_field="kind", tag="distilled"):
    """The student: the teacher with another image encoder.

    Attributes:
        image_encoder: name of a light encoder, as in ``coprs-deploy convert --random``, or a table
            with the sizes of one, by ``family``: ``tiny_vit``, ``efficientvit``, ``resnet``, or
            ``vit`` for SAM's own architecture.
    """

    image_encoder: str | VitConfig | LightEncoderConfig = "tinyvit_5m"

    def __post_init__(self) -> None:
        if isinstance(self.image_encoder, str) and self.image_encoder not in ENCODERS:
            raise ValueError(
                f"image_encoder is {self.image_encoder!r}; accepted: {', '.join(ENCODERS)}, or a "
                "table with family and sizes"
            )

    def student(self, teacher: SamConfig) -> SamConfig:
        """Return the sizes of the student, whose embedding has the size of the teacher's.

        Raises:
            ValueError: the encoder has no such embedding.
        """
        encoder = self.image_encoder
        if isinstance(encoder, str):
            encoder = ENCODERS[encoder]
        if not isinstance(encoder, VitConfig):
            return teacher.with_image_encoder(encoder)
        sizes = msgspec.structs.asdict(encoder)
        patch = sizes.pop("patch_size") or teacher.geometry.patch_size
        geometry = msgspec.structs.replace(
            teacher.geometry, patch_size=patch, image_size=teacher.geometry.grid_size * patch
        )
        return msgspec.structs.replace(teacher, geometry=geometry, image_encoder=None, **sizes)


class DistillationSettings(StageSettings, frozen=True, tag_field="kind", tag="distillation"):
    """Stage that fits the student's embedding, and with a weight for it, its priors and masks.

    Losses are means over the unpadded area of the images.

    Attributes:
        embedding_loss: ``mse``, or ``huber`` (delta 1) as NanoSAM does.
        embedding_loss_weight: weight of the embedding loss.
        decoding_loss_weight: weight of the losses behind the teacher's frozen prior and decoder,
            which compare with its priors and masks; above 0, the stage trains on ``examples``.
        loss_weights: weights of these losses among themselves.
    """

    metric_names = (
        EMBEDDING_COSINE,
        *(AGREEMENT + name for name in ("giou", "prior_giou")),
        *MASK_METRICS,
    )

    best_metric: str = EMBEDDING_COSINE
    embedding_loss: Literal["mse", "huber"] = "mse"
    embedding_loss_weight: Weight = 1.0
    decoding_loss_weight: Weight = 0.0
    loss_weights: SegmentationLossWeights = SegmentationLossWeights(
        prior_bce=1.0, mask_dice=1.0, mask_bce=1.0
    )

    def batch_text(self) -> str:
        """Return what a step learns from."""
        kind = "examples" if self.decoding_loss_weight else "images"
        return f"{self.global_batch_size} {kind}"


class DistillationRecipe(RunSettings, frozen=True, kw_only=True):
    """Recipe of an image encoder that is distilled from that of a checkpoint.

    Attributes:
        model: the student.
        teacher: checkpoint directory of the teacher; empty for the demo model of the package.
        images: unlabeled training images: a folder, or a source of examples, whose instructions
            and masks are not used.
        examples: source of examples for stages with a ``decoding_loss_weight``: the concentrations
            of their instructions are the teacher's.
        held_out: source of held-out examples, or a folder of held-out images; empty holds out some
            of ``images``.
        num_held_out_images: number of images that are held out when ``held_out`` is empty.
        features: folder of the teacher's embeddings, as ``coprs-deploy features`` writes it; empty
            computes them in every step.
        stages: name to stage, in the order in which they run.
    """

    model: DistilledModel = DistilledModel()
    teacher: str = ""
    images: str = ""
    examples: str = ""
    held_out: str = ""
    num_held_out_images: Positive = 256
    features: str = ""
    stages: dict[str, DistillationSettings]

    def sources(self) -> Mapping[str, str]:
        """Return the sources of data that are named, by key."""
        named = {"images": self.images, "examples": self.examples, "held_out": self.held_out}
        return {key: source for key, source in named.items() if source or key == "images"}
