"""Image preprocessing of a policy in numpy: the pixels of transformers' PIL processors.

Sizes follow the public processors of Qwen2.5-VL (both sides become multiples of a merged patch,
the area stays within limits) and CLIP (the shorter side is scaled, the center is cut out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.errors import ImageSizeError, PolicyError

MAX_ASPECT_RATIO = 200
"""Largest ratio of the sides that Qwen2.5-VL's processor accepts."""


def check_settings(config: dict[str, Any]) -> None:
    """Check the contents of ``preprocessor_config.json``.

    Raises:
        PolicyError: a step is switched off.
    """
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(name, True):
            raise PolicyError(
                f"{name} is false in the policy's preprocessor_config.json; accepted: true"
            )


@dataclass(frozen=True)
class _Pixels:
    """Preprocessing of images.

    Args:
        config: contents of ``preprocessor_config.json``, defaults filled in.

    Raises:
        PolicyError: a step is switched off.
    """

    config: dict[str, Any]

    def __post_init__(self) -> None:
        check_settings(self.config)


class QwenPixels(_Pixels):
    """Pixels of Qwen2.5-VL: one row per patch, the patches of a token next to each other."""

    def __call__(self, image: Image.Image) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Preprocess an RGB image.

        Returns:
            (P, 3 * T * S * S) float32 patches of side S, repeated T times, and the number of
            patches (rows, columns).
        """
        side, merge = self.config["patch_size"], self.config["merge_size"]
        width, height = self.size_of(image.width, image.height)
        pixels = _normalize(_resize(image, width, height, self.config), self.config)
        rows, columns = height // side, width // side
        patches = pixels.reshape(
            rows // merge, merge, side, columns // merge, merge, side, pixels.shape[-1]
        ).transpose(0, 3, 1, 4, 6, 2, 5)
        times = self.config["temporal_patch_size"]
        repeated = np.broadcast_to(
            patches[..., None, :, :], (*patches.shape[:5], times, side, side)
        )
        return np.ascontiguousarray(repeated.reshape(rows * columns, -1)), (rows, columns)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after resizing.

        Raises:
            ImageSizeError: one side is more than 200 times the other.
        """
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise ImageSizeError(
                f"the image has {width} x {height} pixels; the policy accepts images whose longer "
                f"side is at most {MAX_ASPECT_RATIO} times the shorter one: crop it"
            )
        unit = self.config["patch_size"] * self.config["merge_size"]
        limits = self.config["size"]
        sides = [unit * round(side / unit) for side in (width, height)]
        area = sides[0] * sides[1]
        if area > limits["longest_edge"]:
            scale = math.sqrt(width * height / limits["longest_edge"])
            sides = [max(unit, unit * math.floor(side / scale / unit)) for side in (width, height)]
        elif area < limits["shortest_edge"]:
            scale = math.sqrt(limits["shortest_edge"] / (width * height))
            sides = [unit * math.ceil(side * scale / unit) for side in (width, height)]
        return sides[0], sides[1]


class ClipPixels(_Pixels):
    """Pixels of LLaVA-1.5: one square of constant size."""

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Preprocess an RGB image; return (1, 3, S, S) float32."""
        shortest = self.config["size"]["shortest_edge"]
        scaled = [int(shortest * side / min(image.size)) for side in image.size]
        resized = _resize(image, scaled[0], scaled[1], self.config)
        crop = self.config["crop_size"]
        top = (resized.shape[0] - crop["height"]) // 2
        left = (resized.shape[1] - crop["width"]) // 2
        square = resized[top : top + crop["height"], left : left + crop["width"]]
        return np.ascontiguousarray(_normalize(square, self.config).transpose(2, 0, 1)[None])


def _resize(image: Image.Image, width: int, height: int, config: dict[str, Any]) -> NDArray[Any]:
    return np.asarray(image.resize((width, height), Image.Resampling(config["resample"])))


def _normalize(rgb: NDArray[Any], config: dict[str, Any]) -> NDArray[np.float32]:
    scaled = (rgb.astype(np.float64) * config["rescale_factor"]).astype(np.float32)
    mean, std = (np.array(config[name], np.float32) for name in ("image_mean", "image_std"))
    normalized: NDArray[np.float32] = (scaled - mean) / std
    return normalized
