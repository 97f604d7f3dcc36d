"""A training run as one typed record, read from one TOML file.

A recipe is complete: two runs of one recipe on one machine give the same weights. Unknown keys are
refused, with the nearest name. With a line ``base = "NAME"``, a file only says in what it differs
from another recipe. The files lie beside this module in ``recipes/``.
"""

from __future__ import annotations

from coprs_deploy.model_config import SegmentationConfig
from coprs_deploy.specs import Record
from coprs_deploy.training.settings import (
    SegmentationLossWeights,
    StageSettings,
)


class TinyPolicy(Record, frozen=True):
    """Sizes of a Qwen2.5-VL policy that is trained from nothing.

    Attributes:
        image_size: side in pixels of the square image that it sees.
        patch_size: side of a patch in pixels; 2 x 2 patches make one image token.
        hidden_size: D, the width of the language model.
        num_hidden_layers: layers of the language model.
        num_attention_heads: attention heads of the language model.
        intermediate_size: hidden width of its MLPs.
        vision_hidden_size: width of the vision tower.
        vision_depth: its blocks, all with attention over the whole image.
        vision_num_heads: its attention heads; vLLM wants heads at least 32 wide.
        vision_intermediate_size: hidden width of its MLPs.
        rope_theta: base of the rotary frequencies. The usual 1e6 turns an axis of a small grid by
            next to nothing.
        mrope_section: rotary frequencies for time, row and column; they add up to half a head.
        initializer_range: standard deviation of the starting weights.
        vocab_size: largest number of tokens.
        max_response_tokens: longest response.
        instruction: what stands around an instruction in the prompt.
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
    instruction: str = "{instruction}"

    def __post_init__(self) -> None:
        for name, value, divisor in (
            ("image_size", self.image_size, 2 * self.patch_size),
            ("hidden_size", self.hidden_size, 2 * self.num_attention_heads),
            ("vision_hidden_size", self.vision_hidden_size, 4 * self.vision_num_heads),
        ):
            if value % divisor:
                raise ValueError(f"{name} is {value}; it must be a multiple of {divisor}")
        if sum(self.mrope_section) != self.hidden_size // self.num_attention_heads // 2:
            raise ValueError(
                f"mrope_section is {self.mrope_section}; it must add up to half the width of a "
                f"head, {self.hidden_size // self.num_attention_heads // 2}"
            )

    @property
    def grid_size(self) -> int:
        """Image tokens along one side."""
        return self.image_size // (2 * self.patch_size)


class TinyModel(Record, frozen=True, tag_field="kind", tag="small"):
    """A whole small CoPRS that is asked many questions on each scene.

    Attributes:
        segmentation: sizes of the segmentation path.
        policy: sizes of the policy.
        start: checkpoint directory of a model of these sizes that is trained further; its
            tokenizer is kept. Empty starts from random weights.
    """

    segmentation: SegmentationConfig
    policy: TinyPolicy = TinyPolicy()
    start: str = ""

    def __post_init__(self) -> None:
        if self.segmentation.policy_hidden_size != self.policy.hidden_size:
            raise ValueError(
                f"segmentation.policy_hidden_size is {self.segmentation.policy_hidden_size}, policy.hidden_size is "
                f"{self.policy.hidden_size}; they must be equal"
            )


class PerceptionSettings(StageSettings, frozen=True, tag_field="kind", tag="warm_up"):
    """The policy learns to see, through heads on its image tokens that are thrown away.

    Attributes:
        num_language_layers: layers of the language model that take part.
        compile: whether the transformer blocks are compiled.
    """

    num_language_layers: int = 2
    compile: bool = False


class SegmentationSettings(StageSettings, frozen=True, tag_field="kind", tag="segmentation"):
    """The segmentation path learns alone, asked by a query that knows the target.

    Attributes:
        targets_per_image: objects of each image that are asked for.
        weights: of the segmentation losses.
        auxiliary_loss_weight: of the heads on the image embedding that are thrown away.
    """

    targets_per_image: int = 3
    weights: SegmentationLossWeights = SegmentationLossWeights()
    auxiliary_loss_weight: float = 0.5
