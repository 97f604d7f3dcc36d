"""Image preprocessing of a policy: pixel values and the number of vision tokens.

The PIL image processors are chosen explicitly: they return the same pixels with and without
torchvision. Prompts are encoded by :mod:`coprs_deploy.prompts`, so no multimodal processor class of
transformers is used.
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
    """Model inputs for one image.

    Attributes:
        tensors: keyword arguments of the forward pass.
        num_tokens: number of vision tokens in the prompt.
        marks_image_tokens: whether the forward pass also takes ``mm_token_type_ids``.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int
    marks_image_tokens: bool


class VisionProcessor:
    """Image preprocessing for the vision tower of one policy directory.

    Args:
        policy_path: policy directory.
        config: its transformers config.

    Raises:
        PolicyError: the model type is unsupported, or the image processor cannot be loaded.
    """

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
            raise PolicyError(
                f"the image processor in {policy_path} cannot be loaded: {error}"
            ) from error
        self._family = _FAMILIES[config.model_type](self.image_processor, config)

    def __call__(self, image: Image.Image) -> VisionInputs:
        """Preprocess one RGB image that was already scaled to the pixel limits of the policy."""
        return self._family.read(self.image_processor(images=[image], return_tensors="pt"))

    def num_tokens(self, width: int, height: int) -> int:
        """Return the number of vision tokens of an image from its size in pixels."""
        return self._family.num_tokens(width, height)

    def largest_image(self, num_tokens: int) -> tuple[int, int]:
        """Return width and height of an image with nearly, and at most, ``num_tokens`` tokens."""
        return self._family.largest_image(num_tokens)

    @property
    def max_tokens(self) -> int:
        """Number of vision tokens of the largest image that the image processor returns."""
        return self._family.max_tokens


@dataclass(frozen=True)
class _Qwen25Vl:
    """Qwen2.5-VL: one token per square of merged patches."""

    processor: Any
    config: Any

    def read(self, processed: Mapping[str, torch.Tensor]) -> VisionInputs:
        grid = processed["image_grid_thw"]
        tensors = {"pixel_values": processed["pixel_values"], "image_grid_thw": grid}
        merged = int(self.config.vision_config.spatial_merge_size) ** 2
        return VisionInputs(tensors, int(grid.prod()) // merged, marks_image_tokens=True)

    def num_tokens(self, width: int, height: int) -> int:
        patches: int = self.processor.get_number_of_image_patches(height, width)
        return patches // int(self.config.vision_config.spatial_merge_size) ** 2

    def largest_image(self, num_tokens: int) -> tuple[int, int]:
        side = math.isqrt(num_tokens)
        return self._token_side * (num_tokens // side), self._token_side * side

    @property
    def max_tokens(self) -> int:
        return int(self.processor.size["longest_edge"]) // self._token_side**2

    @property
    def _token_side(self) -> int:
        """Side, in pixels, of the square behind one token."""
        vision = self.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)


@dataclass(frozen=True)
class _Llava:
    """LLaVA-1.5: one square input size and a constant number of tokens."""

    processor: Any
    config: Any

    def read(self, processed: Mapping[str, torch.Tensor]) -> VisionInputs:
        pixels = processed["pixel_values"]
        num_tokens = self._count_tokens(*pixels.shape[-2:])
        return VisionInputs({"pixel_values": pixels}, num_tokens, marks_image_tokens=False)

    def num_tokens(self, width: int, height: int) -> int:
        return self.max_tokens

    def largest_image(self, num_tokens: int) -> tuple[int, int]:
        crop = self.processor.crop_size
        return int(crop["width"]), int(crop["height"])

    @property
    def max_tokens(self) -> int:
        width, height = self.largest_image(0)
        return self._count_tokens(height, width)

    def _count_tokens(self, height: int, width: int) -> int:
        patch = int(self.config.vision_config.patch_size)
        keeps_class_token = self.config.vision_feature_select_strategy == "full"
        return (height // patch) * (width // patch) + int(keeps_class_token)


_FAMILIES: Mapping[str, type[_Qwen25Vl | _Llava]] = {"qwen2_5_vl": _Qwen25Vl, "llava": _Llava}
