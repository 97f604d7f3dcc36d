"""The image side of a transformers policy: pixels, and how many vision tokens they take.

The PIL image processors are named on purpose: they give the same pixels with and without
torchvision. Prompts are assembled by :mod:`coprs_deploy.prompts`, so no multimodal processor class
of transformers is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from coprs_deploy.errors import PolicyError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VisionInputs:
    """What the model takes for one image.

    Attributes:
        tensors: keyword arguments of the model's forward pass.
        num_tokens: vision tokens in the prompt.
        marks_image_tokens: whether the model also takes ``mm_token_type_ids``.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int
    marks_image_tokens: bool


class VisionProcessor:
    """Prepare pictures for the vision tower of one policy directory."""

    def __init__(self, policy_path: Path, config: Any) -> None:
        from transformers import AutoImageProcessor

        if config.model_type not in _FAMILIES:
            raise PolicyError(
                f"the policy in {policy_path} is of type {config.model_type!r}; "
                f"supported: {', '.join(_FAMILIES)}"
            )
        try:
            self.image_processor: Any = AutoImageProcessor.from_pretrained(
                policy_path, backend="pil", local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise PolicyError(f"{policy_path} holds no usable image processor: {error}") from error
        self._config = config
        self._family = _FAMILIES[config.model_type]

    def __call__(self, picture: Image.Image) -> VisionInputs:
        """Prepare one RGB picture that already has the policy's area."""
        processed = self.image_processor(images=[picture], return_tensors="pt")
        return self._family.read(processed, self._config)

    def num_tokens(self, width: int, height: int) -> int:
        """Vision tokens of a picture of that many pixels, without preparing it."""
        return self._family.num_tokens(self.image_processor, self._config, width, height)

    def largest_picture(self, num_tokens: int) -> tuple[int, int]:
        """Width and height of a picture that takes at most ``num_tokens``, and nearly so many."""
        return self._family.largest_picture(self.image_processor, self._config, num_tokens)

    @property
    def most_tokens(self) -> int:
        """Vision tokens of the largest picture that the image processor gives."""
        return self._family.most_tokens(self.image_processor, self._config)


class _Qwen25Vl:
    """Qwen2.5-VL: as many tokens as the picture has squares of merged patches."""

    @staticmethod
    def read(processed: Mapping[str, torch.Tensor], config: Any) -> VisionInputs:
        grid = processed["image_grid_thw"]
        tensors = {"pixel_values": processed["pixel_values"], "image_grid_thw": grid}
        return VisionInputs(
            tensors, int(grid.prod()) // config.vision_config.spatial_merge_size**2, True
        )

    @staticmethod
    def num_tokens(processor: Any, config: Any, width: int, height: int) -> int:
        patches: int = processor.get_number_of_image_patches(height, width)
        return patches // int(config.vision_config.spatial_merge_size) ** 2

    @staticmethod
    def largest_picture(processor: Any, config: Any, num_tokens: int) -> tuple[int, int]:
        unit = _merged_side(config)
        side = math.isqrt(num_tokens)
        return unit * (num_tokens // side), unit * side

    @staticmethod
    def most_tokens(processor: Any, config: Any) -> int:
        return int(processor.size["longest_edge"]) // _merged_side(config) ** 2


def _merged_side(config: Any) -> int:
    """Pixels along one side of the square that becomes one token of Qwen2.5-VL."""
    return int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)


class _Llava:
    """LLaVA-1.5: one square size, always the same number of tokens."""

    @staticmethod
    def read(processed: Mapping[str, torch.Tensor], config: Any) -> VisionInputs:
        pixels = processed["pixel_values"]
        return VisionInputs(
            {"pixel_values": pixels}, _llava_tokens(config, *pixels.shape[-2:]), False
        )

    @staticmethod
    def num_tokens(processor: Any, config: Any, width: int, height: int) -> int:
        crop = processor.crop_size
        return _llava_tokens(config, int(crop["height"]), int(crop["width"]))

    @staticmethod
    def largest_picture(processor: Any, config: Any, num_tokens: int) -> tuple[int, int]:
        return int(processor.crop_size["width"]), int(processor.crop_size["height"])

    @staticmethod
    def most_tokens(processor: Any, config: Any) -> int:
        return _Llava.num_tokens(processor, config, 0, 0)


def _llava_tokens(config: Any, height: int, width: int) -> int:
    patch = int(config.vision_config.patch_size)
    keeps_class_token = config.vision_feature_select_strategy == "full"
    return (height // patch) * (width // patch) + int(keeps_class_token)


_FAMILIES: Mapping[str, type[_Qwen25Vl | _Llava]] = {"qwen2_5_vl": _Qwen25Vl, "llava": _Llava}
