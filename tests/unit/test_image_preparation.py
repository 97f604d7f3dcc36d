"""Content hash, preprocessing for the image encoder, and resize for the policy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from coprs_deploy.errors import ImageSizeError
from coprs_deploy.images import (
    fit_pixel_count,
    image_key,
    load_image,
    prepare_image,
    unpadded_size,
)
from coprs_deploy.specs import Geometry
from tests.unit.image_samples import PROPERTY, SAM, TINY, colors, encoded


def test_image_key_depends_on_every_pixel_and_the_shape():
    rgb = colors(2, 3)
    changed = rgb.copy()
    changed[1, 2, 2] ^= 1
    keys = {image_key(rgb), image_key(changed), image_key(rgb.reshape(3, 2, 3))}
    assert len(keys) == 3


def test_image_key_depends_on_pixels_and_shape_only():
    rgb = colors(4, 6)
    wide = np.repeat(rgb, 2, axis=1)
    assert image_key(rgb) == image_key(rgb.copy()) == image_key(wide[:, ::2])
    assert image_key(rgb) == image_key(load_image(encoded(Image.fromarray(rgb), "PNG")))


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1, 1), (1024, 1024)),
        ((480, 640), (768, 1024)),
        ((640, 480), (1024, 768)),
        ((1080, 1920), (576, 1024)),
        ((1000, 1001), (1023, 1024)),
        ((3, 2048), (2, 1024)),  # 1.5 rounds up
        ((5, 2048), (3, 1024)),  # 2.5 rounds up, where Python's round() gives 2
        ((2048, 5), (1024, 3)),
        ((4095, 8192), (512, 1024)),  # 511.875
        ((1, 10_000), (1, 1024)),  # 0.1024 would leave no row
    ],
)
def test_unpadded_size_follows_sam(original, expected):
    assert unpadded_size(*original, 1024) == expected


@PROPERTY
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    image_size=st.sampled_from([64, 128, 1000, 1024]),
)
def test_unpadded_size_keeps_the_aspect_ratio_to_half_a_pixel(height, width, image_size):
    new_height, new_width = unpadded_size(height, width, image_size)
    assert max(new_height, new_width) == image_size
    short, new_short = min(height, width), min(new_height, new_width)
    exact = short * image_size / max(height, width)
    assert new_short >= 1
    assert -0.5 <= exact - new_short < 0.5 or (new_short == 1 and exact < 1)
    assert unpadded_size(width, height, image_size) == (new_width, new_height)


def test_prepare_image_of_the_model_size_is_only_normalized():
    geometry = Geometry(
        image_size=16, patch_size=4, pixel_mean=(10.0, 20.0, 30.0), pixel_std=(2.0, 4.0, 8.0)
    )
    rgb = colors(10, 16)
    prepared = prepare_image(rgb, geometry)
    assert prepared.image.shape == (1, 3, 16, 16)
    assert prepared.image.dtype == np.float32
    assert prepared.unpadded_size.dtype == np.int64
    assert prepared.unpadded_size.tolist() == [10, 16]
    assert prepared.original_size == (10, 16)
    expected = (rgb.astype(np.float64) - (10, 20, 30)) / (2, 4, 8)
    np.testing.assert_allclose(prepared.image[0, :, :10].transpose(1, 2, 0), expected, rtol=1e-6)


def test_prepare_image_sam_normalization_has_its_worked_values():
    prepared = prepare_image(np.full((1024, 1024, 3), (255, 0, 104), dtype=np.uint8), SAM)
    np.testing.assert_allclose(prepared.image[0, :, 0, 0], [2.248908, -2.035714, 0.00819172], 1e-5)


@settings(PROPERTY, max_examples=30)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 9))
def test_prepare_image_pads_bottom_and_right_with_zeros(height, width, seed):
    rgb = np.maximum(colors(height, width, seed=seed), 200)  # nothing near any mean
    before = rgb.copy()
    prepared = prepare_image(rgb, TINY)
    inside_height, inside_width = prepared.unpadded_size
    assert (inside_height, inside_width) == unpadded_size(height, width, 128)
    assert prepared.original_size == (height, width)
    assert (prepared.image[:, :, inside_height:] == 0).all()
    assert (prepared.image[:, :, :, inside_width:] == 0).all()
    assert (prepared.image[:, :, :inside_height, :inside_width] > 1).all()
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (40, 31), (500, 90)])
def test_prepare_image_resizes_like_an_antialiased_bilinear_filter(height, width):
    rgb = colors(height, width)
    prepared = prepare_image(rgb, TINY)
    inside = tuple(prepared.unpadded_size.tolist())
    reference = F.interpolate(
        torch.from_numpy(rgb).permute(2, 0, 1)[None].float(),
        inside,
        mode="bilinear",
        antialias=True,
    )[0].numpy()
    mean, std = (np.array(v)[:, None, None] for v in (TINY.pixel_mean, TINY.pixel_std))
    levels = prepared.image[0, :, : inside[0], : inside[1]] * std + mean
    assert np.abs(levels - reference).max() <= 1.01  # Pillow rounds to 8 bits after each side
    assert abs((levels - reference).mean()) < 0.05


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (3_136, 705_600), (480, 640)),
        ((840, 840), (3_136, 705_600), (840, 840)),
        ((56, 56), (3_136, 705_600), (56, 56)),
        ((1680, 1680), (3_136, 705_600), (840, 840)),
        ((1080, 1920), (3_136, 705_600), (630, 1120)),
        ((28, 28), (3_136, 705_600), (56, 56)),
        ((10, 40), (3_136, 705_600), (28, 112)),
        ((1, 1), (3_136, 705_600), (56, 56)),
        ((11, 13), (3_136, 705_600), (52, 61)),  # both sides up
        ((1000, 1300), (3_136, 705_600), (736, 957)),  # both sides down
    ],
)
def test_fit_pixel_count_has_its_worked_values(size, limits, expected):
    image = fit_pixel_count(np.zeros((*size, 3), dtype=np.uint8), *limits)
    assert (image.height, image.width) == expected
    assert image.mode == "RGB"


@PROPERTY
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    min_pixels=st.integers(1, 2_000),
    room=st.integers(4, 40),
)
def test_fit_pixel_count_keeps_the_limits_and_the_aspect_ratio(height, width, min_pixels, room):
    max_pixels = min_pixels * room
    assume(max(height, width) <= min(max_pixels, 200) * min(height, width))
    assume(max(height, width) <= min_pixels or height * width >= min_pixels)
    image = fit_pixel_count(np.zeros((height, width, 3), dtype=np.uint8), min_pixels, max_pixels)
    area = height * width
    if min_pixels <= area <= max_pixels:
        assert (image.height, image.width) == (height, width)
        return
    assert image.height * image.width <= max_pixels
    assert image.height * image.width >= min(min_pixels, max_pixels)
    exact_scale = ((max_pixels if area > max_pixels else min_pixels) / area) ** 0.5
    for new, old in ((image.height, height), (image.width, width)):
        assert abs(new - old * exact_scale) < 1 + 1e-9


def test_fit_pixel_count_keeps_the_upper_limit_for_a_line_of_pixels():
    image = fit_pixel_count(np.zeros((1, 200, 3), dtype=np.uint8), 16, 100)
    assert image.height * image.width <= 100


@pytest.mark.parametrize(
    ("size", "ratio"), [((1, 500), "500"), ((201, 1), "201"), ((3, 1000), "333.3")]
)
def test_fit_pixel_count_of_an_extreme_aspect_ratio_is_refused(size, ratio):
    height, width = size
    message = f"the image is {width} x {height}, an aspect ratio of {ratio}; .* at most 200"
    with pytest.raises(ImageSizeError, match=message):
        fit_pixel_count(np.zeros((*size, 3), dtype=np.uint8), 3_136, 705_600)


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (100, 19_999), (19_999, 100)])
def test_fit_pixel_count_rounding_keeps_the_largest_aspect_ratio(size):
    image = fit_pixel_count(np.zeros((*size, 3), dtype=np.uint8), 3_136, 705_600)
    assert max(image.size) <= 200 * min(image.size)


def test_fit_pixel_count_keeps_the_upper_limit_when_it_equals_the_lower_one():
    image = fit_pixel_count(np.zeros((10, 17, 3), dtype=np.uint8), 784, 784)
    assert image.height * image.width <= 784


@pytest.mark.parametrize(("side", "largest"), [(250, 0), (1600, 3)])
def test_fit_pixel_count_strong_shrinking_keeps_the_colors(side, largest):
    """Levels of 255: exact below the reducing gap of six; above it, a scene differed by 2."""
    generator = np.random.default_rng(5)
    coarse = generator.integers(0, 256, (25, 25, 3), dtype=np.uint8)
    rgb = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    found = np.asarray(fit_pixel_count(rgb, 100, 100 * 100)).astype(int)
    plain = np.asarray(Image.fromarray(rgb).resize((100, 100), Image.Resampling.BICUBIC))
    assert np.abs(found - plain).max() <= largest


def test_fit_pixel_count_inside_the_limits_changes_nothing():
    rgb = colors(30, 40)
    np.testing.assert_array_equal(np.asarray(fit_pixel_count(rgb, 100, 10_000)), rgb)


def test_fit_pixel_count_keeps_a_uniform_image_uniform():
    for size in (4, 400):
        rgb = np.full((size, size, 3), (12, 200, 77), dtype=np.uint8)
        image = np.asarray(fit_pixel_count(rgb, 400, 4_000))
        assert (image == (12, 200, 77)).all()


@pytest.mark.parametrize(("height", "width"), [(60, 90), (15, 12)])
def test_fit_pixel_count_resizes_like_an_antialiased_bicubic_filter(height, width):
    rgb = np.clip(colors(height, width), 40, 215)
    image = np.asarray(fit_pixel_count(rgb, 1_000, 2_000))
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    reference = F.interpolate(pixels, image.shape[:2], mode="bicubic", antialias=True)
    levels = reference[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(image - levels).max() <= 2  # Pillow rounds to 8 bits after each side
    assert abs((image - levels).mean()) < 0.05
