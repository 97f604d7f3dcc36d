"""Recipe of the tiny model: its sizes and the stages that train it on generated scenes.

It shares :class:`~coprs_deploy.training.recipe.RunSettings` and the loader with the recipes that
start from a checkpoint. It imports neither torch nor TRL.
"""

from __future__ import annotations

from coprs_deploy.model_config import SegmentationConfig
from coprs_deploy.specs import Record
from coprs_deploy.training.recipe import RunSettings
from coprs_deploy.training.settings import (
    MASK_METRICS,
    Count,
    SegmentationLossWeights,
    StageSettings,
    SyntheticData,
)

NO_REASONING = "no_reasoning_"
"""Start of the names of metrics of masks without any reasoning."""


class TinyPolicy(Record, frozen=True):
    """Sizes of a Qwen2.5-VL policy that is trained from random weights.

    Attributes:
        image_size: side of the square input image in pixels.
        patch_size: side of a patch in pixels; 2 x 2 patches make one image token.
        hidden_size: hidden size D of the language model.
        num_hidden_layers: layers of the language model.
        num_attention_heads: attention heads of the language model.
        intermediate_size: hidden size of the language model's MLPs.
        vision_hidden_size: hidden size of the vision tower.
        vision_depth: blocks of the vision tower, all with full attention.
        vision_num_heads: attention heads of the vision tower; vLLM needs heads of at least 32
            channels.
        vision_intermediate_size: hidden size of the vision tower's MLPs.
        rope_theta: base of the rotary frequencies. The usual 1e6 hardly rotates along an axis of a
            small grid.
        mrope_section: rotary frequencies for time, row and column; their sum is half a head.
        initializer_range: standard deviation of the initial weights.
        vocab_size: largest number of tokens.
        max_response_tokens: longest response in tokens.
        instruction_template: text around the instruction in the prompt.
    """

    image_size: int = 128
    patch_size: int = 8
    hidden_size: int = 128
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    intermediate_size: int = 352
    vision_hidden_size: int = 96
    vision_depth: int = 4
    vision_num_heads: int = 3
    vision_intermediate_size: int = 256
    rope_theta: float = 500.0
    mrope_section: tuple[int, int, int] = (2, 3, 11)
    initializer_range: float = 0.06
    vocab_size: int = 1024
    max_response_tokens: int = 128
    instruction_template: str = "{instruction}"

    def __post_init__(self) -> None:
        for name, value, divisor in (
            ("image_size", self.image_size, 2 * self.patch_size),
            ("hidden_size", self.hidden_size, 2 * self.num_attention_heads),
            ("vision_hidden_size", self.vision_hidden_size, 4 * self.vision_num_heads),
        ):
            if value % divisor:
                raise ValueError(f"{name} is {value}; it must be a multiple of {divisor}")
        half_head = self.hidden_size // self.num_attention_heads // 2
        if sum(self.mrope_section) != half_head:
            raise ValueError(
                f"mrope_section is {self.mrope_section}; its sum must be half the size of a head, "
                f"{half_head}"
            )

    @property
    def grid_size(self) -> int:
        """Image tokens along one side."""
        return self.image_size // (2 * self.patch_size)


class TinyModel(Record, frozen=True, tag_field="kind", tag="tiny"):
    """Tiny CoPRS model.

    Attributes:
        segmentation: sizes of the segmentation path.
        policy: sizes of the policy.
        init_from: checkpoint directory of a model of these sizes to start from; its tokenizer is
            kept. Empty starts from random weights.
    """

    segmentation: SegmentationConfig
    policy: TinyPolicy = TinyPolicy()
    init_from: str = ""

    def __post_init__(self) -> None:
        if self.segmentation.policy_hidden_size != self.policy.hidden_size:
            raise ValueError(
                f"segmentation.policy_hidden_size is {self.segmentation.policy_hidden_size}, "
                f"policy.hidden_size is {self.policy.hidden_size}; they must be equal"
            )


class PerceptionSettings(StageSettings, frozen=True, tag_field="kind", tag="perception"):
    """Perception stage: pre-training of the policy through auxiliary heads on its image tokens.

    Attributes:
        num_language_layers: number of language layers that are trained.
        torch_compile: whether the transformer blocks are compiled.
    """

    metric_names = ("center", "color", "column", "row", "shape", "size", "texture")

    num_language_layers: int = 2
    torch_compile: bool = False


class SegmentationSettings(StageSettings, frozen=True, tag_field="kind", tag="segmentation"):
    """Segmentation stage: the segmentation path alone, with an oracle query per target.

    Attributes:
        targets_per_image: number of targets per image.
        loss_weights: weights of the single segmentation losses.
        auxiliary_loss_weight: weight of the auxiliary heads on the image embedding.
    """

    metric_names = MASK_METRICS

    best_metric: str = "giou"
    targets_per_image: int = 3
    loss_weights: SegmentationLossWeights = SegmentationLossWeights()
    auxiliary_loss_weight: float = 0.5


class ReasoningSettings(StageSettings, frozen=True, tag_field="kind", tag="reasoning"):
    """Reasoning stage: supervised responses; with segmentation losses, the whole model jointly.

    Attributes:
        questions_per_image: largest number of questions per image.
        question_type_weights: sampling weight by question type; empty for those of the preset.
        initial_question_type_weights: the same for the first steps, simple types first.
        initial_ratio: share of the steps that use ``initial_question_type_weights``.
        max_packed_length: tokens of one image with its packed questions. Questions that do not fit
            are dropped, long ones first (``frac_questions_dropped`` in the log is their share). 0
            sets no limit.
        num_truncations: further answers to each question with a target, in the same row: the
            reasoning is truncated at a random length, the first time at 0, and the losses of
            ``<REF_POS>`` teach the best guess after it. No loss teaches to end the reasoning there.
            0 disables them.
        language_loss_weight: weight of the cross-entropy on the response.
        kl_loss_weight: weight of the KL divergence of the next token from the policy as the stage
            finds it, which keeps the responses while masks are trained; tokens of truncations have
            none. 0 disables it, and with it one more forward pass per step.
        location_token_weight: weight of a token that names a row or column, as a label.
        reference_head_loss_weight: weight of the auxiliary head that reads the target from
            ``<REF_POS>``.
        auxiliary_loss_weight: weight of the perception stage's heads; decays with the learning
            rate.
        segmentation_loss_weight: weight of the segmentation losses (lambda_SEG); 0 disables them.
        segmentation_ratio: share of the targets with segmentation losses.
        loss_weights: weights of the single segmentation losses.
        init_query_head: whether the query head is first solved for by ridge regression, so that
            the policy's states give the queries that the segmentation path was trained with.
        train_image_encoder: whether SAM's image encoder is trained.
        torch_compile: whether the transformer blocks are compiled.
    """

    metric_names = (
        *("location_accuracy", "exact_match", "no_match_precision", "no_match_recall"),
        *(*MASK_METRICS, "ciou", "object_accuracy", "pearson_r"),
        *(NO_REASONING + name for name in MASK_METRICS),
    )

    best_metric: str = "giou"
    questions_per_image: int = 4
    question_type_weights: dict[str, float] = {}
    initial_question_type_weights: dict[str, float] = {}
    initial_ratio: float = 0.0
    max_packed_length: int = 0
    num_truncations: Count = 0
    language_loss_weight: float = 1.0
    kl_loss_weight: float = 0.0
    location_token_weight: float = 1.0
    reference_head_loss_weight: float = 0.0
    auxiliary_loss_weight: float = 0.0
    segmentation_loss_weight: float = 0.0
    segmentation_ratio: float = 1.0
    loss_weights: SegmentationLossWeights = SegmentationLossWeights()
    init_query_head: bool = False
    train_image_encoder: bool = False
    torch_compile: bool = False


class CurriculumRecipe(RunSettings, frozen=True, kw_only=True):
    """Recipe of a tiny model on generated scenes.

    Attributes:
        model: sizes of the model.
        data: generated scenes.
        stages: name to stage, in the order in which they run.
    """

    model: TinyModel
    data: SyntheticData
    stages: dict[str, PerceptionSettings | SegmentationSettings | ReasoningSettings]
