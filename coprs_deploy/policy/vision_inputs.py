"""Image preprocessing for a policy in PyTorch: pixel values and the number of vision tokens.

Settings come from transformers' image processor, which fills in defaults; pixels from
:mod:`coprs_deploy.policy.pixels`. Prompts are encoded by :mod:`coprs_deploy.prompts`, so no
multimodal processor class of transformers is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from coprs_deploy.errors import PolicyError
from coprs_deploy.policy.pixels import ClipPixels, QwenPixels

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
        PolicyError: the model type or a setting of the image processor is not supported, or it
            cannot be loaded.
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
        settings = json.loads(self.image_processor.to_json_string())
        self._family = _FAMILIES[config.model_type](settings, config)

    def __call__(self, image: Image.Image) -> VisionInputs:
        """Preprocess one RGB image that was already scaled to the pixel limits of the policy.

        Raises:
            ImageSizeError: Qwen2.5-VL does not accept the aspect ratio.
        """
        return self._family.read(image)

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


class _Qwen25Vl:
    """Qwen2.5-VL: one token per square of merged patches."""

    def __init__(self, settings: dict[str, Any], config: Any) -> None:
        self._pixels = QwenPixels(settings)
        vision = config.vision_config
        self._merge = int(vision.spatial_merge_size)
        # Side, in pixels, of the square behind one token.
        self._side = int(vision.patch_size) * self._merge

    def read(self, image: Image.Image) -> VisionInputs:
        import torch

        patches, grid = self._pixels(image)
        tensors = {
            "pixel_values": torch.from_numpy(patches),
            "image_grid_thw": torch.tensor([[1, *grid]]),
        }
        num_tokens = grid[0] * grid[1] // self._merge**2
        return VisionInputs(tensors, num_tokens, marks_image_tokens=True)

    def num_tokens(self, width: int, height: int) -> int:
        width, height = self._pixels.size_of(width, height)
        return (width // self._side) * (height // self._side)

    def largest_image(self, num_tokens: int) -> tuple[int, int]:
        side = math.isqrt(num_tokens)
        return self._side * (num_tokens // side), self._side * side

    @property
    def max_tokens(self) -> int:
        return int(self._pixels.config["size"]["longest_edge"]) // self._side**2


class _Llava:
    """LLaVA-1.5: one square input size and a constant number of tokens."""

    def __init__(self, settings: dict[str, Any], config: Any) -> None:
        self._pixels = ClipPixels(settings)
        width, height = self.largest_image(0)
        patch = int(config.vision_config.patch_size)
        keeps_class_token = config.vision_feature_select_strategy == "full"
        self.max_tokens = (height // patch) * (width // patch) + int(keeps_class_token)

    def read(self, image: Image.Image) -> VisionInputs:
        import torch

        tensors = {"pixel_values": torch.from_numpy(self._pixels(image))}
        return VisionInputs(tensors, self.max_tokens, marks_image_tokens=False)

    def num_tokens(self, width: int, height: int) -> int:
        return self.max_tokens

    def largest_image(self, num_tokens: int) -> tuple[int, int]:
        crop = self._pixels.config["crop_size"]
        return int(crop["width"]), int(crop["height"])


_FAMILIES: Mapping[str, type[_Qwen25Vl | _Llava]] = {"qwen2_5_vl": _Qwen25Vl, "llava": _Llava}
