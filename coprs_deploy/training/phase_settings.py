"""What a recipe says about its phases: steps, how weights move, and what each kind adds."""

from __future__ import annotations

from typing import Literal

from coprs_deploy.specs import Record
from coprs_deploy.training.losses import SegmentationLossWeights


class Optimizer(Record, frozen=True):
    """How weights move.

    Attributes:
        rate: learning rate at its peak.
        rate_factors: multiples of the rate by the first part of a parameter's name (``prior``,
            ``prompt_encoder``, ``mask_decoder``, ``image_encoder``, ``policy``).
        muon: whether hidden matrices are moved by Muon, the rest by AdamW.
        weight_decay: decoupled weight decay.
        betas: decay of AdamW's two moments.
        clip: largest norm of the whole gradient.
        warm_up_steps: steps over which the rate rises linearly.
        decay: ``linear`` or ``cosine``.
        decay_share: share of the steps, at the end, over which the rate falls.
        floor: the rate at the end, as a share of its peak.
    """

    rate: float = 2e-3
    rate_factors: dict[str, float] = {}
    muon: bool = True
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    warm_up_steps: int = 60
    decay: Literal["linear", "cosine"] = "linear"
    decay_share: float = 0.6
    floor: float = 0.02


class Phase(Record, frozen=True):
    """What all phases have.

    Attributes:
        steps: updates of the weights.
        batch_images: images an update, over all processes together.
        optimizer: how weights move.
        evaluate_every: steps between two looks at held-out scenes; 0 for the end only.
        evaluation_scenes: held-out scenes of one look.
        gates: what the phase must reach at its end: metric to smallest value.
    """

    steps: int
    batch_images: int = 32
    optimizer: Optimizer = Optimizer()
    evaluate_every: int = 0
    evaluation_scenes: int = 256
    gates: dict[str, float] = {}

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "evaluation_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class WarmUpPhase(Phase, frozen=True, tag_field="kind", tag="warm_up"):
    """The policy learns to see, through heads on its image tokens that are thrown away.

    Attributes:
        language_layers: layers of the language model that take part.
        compile: whether the transformer blocks are compiled.
    """

    language_layers: int = 2
    compile: bool = False


class SegmentationPhase(Phase, frozen=True, tag_field="kind", tag="segmentation"):
    """The segmentation path learns alone, asked by a query that knows the target.

    Attributes:
        targets_per_image: objects of each image that are asked for.
        weights: of the segmentation losses.
        dense_weight: of the heads on the image embedding that are thrown away.
    """

    targets_per_image: int = 3
    weights: SegmentationLossWeights = SegmentationLossWeights()
    dense_weight: float = 0.5


class SupervisedPhase(Phase, frozen=True, tag_field="kind", tag="supervised"):
    """The policy learns to reason, and with segmentation losses the whole model to answer.

    Attributes:
        questions_per_image: questions asked on one image at most.
        kinds: weight of each kind of question; empty takes the tier's own.
        opening_kinds: the same for the first steps, simple ones first.
        opening_share: share of the steps that take ``opening_kinds``.
        packed_length: tokens of one image with its questions behind it; what does not fit is left
            out, long questions first (``left_out`` in the log is their share). 0 gives each
            question a row of its own and takes the policy's own forward pass.
        reasoning_weight: of the cross-entropy on the response.
        place_weight: how much a token that names a place counts, as a label.
        readout_weight: of a throw-away head that reads the target from ``<REF_POS>``.
        dense_weight: of the warm-up's heads; falls with the learning rate.
        segmentation_weight: of the segmentation losses (lambda_SEG); 0 leaves them out.
        segmented_share: share of the answers that the segmentation losses are computed on.
        weights: of the segmentation losses among themselves.
        join: first solve for the query head that maps the policy's states to the queries that the
            segmentation path was trained with.
        train_image_encoder: whether SAM's image encoder learns too.
        compile: whether the transformer blocks are compiled.
    """

    questions_per_image: int = 4
    kinds: dict[str, float] = {}
    opening_kinds: dict[str, float] = {}
    opening_share: float = 0.0
    packed_length: int = 0
    reasoning_weight: float = 1.0
    place_weight: float = 1.0
    readout_weight: float = 0.0
    dense_weight: float = 0.0
    segmentation_weight: float = 0.0
    segmented_share: float = 1.0
    weights: SegmentationLossWeights = SegmentationLossWeights()
    join: bool = False
    train_image_encoder: bool = False
    compile: bool = False
