"""Image preprocessing in numpy against transformers' PIL processors."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from coprs_deploy.errors import ImageSizeError
from coprs_deploy.policy.pixels import ClipPixels, QwenPixels

SIZES = [(56, 56), (1, 150), (333, 777), (1920, 1080), (17, 900), (28, 27)]


def noise(width, height):
    generator = np.random.default_rng(width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("patch_size", "limits"), [(14, (784, 705_600)), (8, (16_384, 16_384)), (14, (784, 12_544))]
)
def test_qwen_pixels_equal_those_of_transformers(size, patch_size, limits):
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": limits[0], "longest_edge": limits[1]}
    )
    image = noise(*size)
    expected = processor(images=[image], return_tensors="np")
    patches, grid = QwenPixels(json.loads(processor.to_json_string()))(image)
    assert (1, *grid) == tuple(expected["image_grid_thw"][0])
    np.testing.assert_array_equal(patches, expected["pixel_values"])
    assert patches.dtype == np.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [224, 336, 57])
def test_clip_pixels_equal_those_of_transformers(size, side):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    image = noise(*size)
    expected = processor(images=[image], return_tensors="np")["pixel_values"]
    pixels = ClipPixels(json.loads(processor.to_json_string()))(image)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == np.float32


def test_qwen_pixels_of_an_extreme_aspect_ratio_are_refused():
    config = json.loads(Qwen2VLImageProcessorPil().to_json_string())
    with pytest.raises(ImageSizeError, match=r"1 x 201 pixels; .* at most 200 times .* crop it"):
        QwenPixels(config)(noise(1, 201))
