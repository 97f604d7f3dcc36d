"""The image side of a transformers policy: pixels, and how many vision tokens they take.

The PIL image processors are named on purpose: they give the same pixels with and without
torchvision. Prompts are assembled by :mod:`coprs_deploy.prompts`, so no multimodal processor class
of transformers is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
            self._processor = AutoImageProcessor.from_pretrained(
                policy_path, backend="pil", local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise PolicyError(f"{policy_path} holds no usable image processor: {error}") from error
        self._config = config
        self._read = _FAMILIES[config.model_type]

    def __call__(self, picture: Image.Image) -> VisionInputs:
        """Prepare one RGB picture that already has the policy's area."""
        return self._read(self._processor(images=[picture], return_tensors="pt"), self._config)


def _qwen2_5_vl(processed: Mapping[str, torch.Tensor], config: Any) -> VisionInputs:
    grid = processed["image_grid_thw"]
    tensors = {"pixel_values": processed["pixel_values"], "image_grid_thw": grid}
    return VisionInputs(
        tensors, int(grid.prod()) // config.vision_config.spatial_merge_size**2, True
    )


def _llava(processed: Mapping[str, torch.Tensor], config: Any) -> VisionInputs:
    pixels = processed["pixel_values"]
    patch = config.vision_config.patch_size
    num_tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    if config.vision_feature_select_strategy == "full":
        num_tokens += 1  # the class token of CLIP
    return VisionInputs({"pixel_values": pixels}, num_tokens, False)


_FAMILIES: Mapping[str, Callable[[Mapping[str, torch.Tensor], Any], VisionInputs]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "llava": _llava,
}
