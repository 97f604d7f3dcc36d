import warnings

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.visualization import (
    HEAT_COLORS,
    SHORTEST_LONG_SIDE,
    TARGET_COLORS,
    draw_heatmap,
    draw_overlay,
)

GREY = 120


def flat(height, width, value=GREY):
    return np.full((height, width, 3), value, dtype=np.uint8)


def square(height, width, rows, columns):
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = True
    return mask


def no_masks(height, width):
    return np.zeros((0, height, width), dtype=bool)


def pixels(picture):
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


SIZES = [
    ((640, 480), (640, 480)),
    ((900, 1200), (900, 1200)),
    ((64, 32), (640, 320)),
    ((32, 64), (320, 640)),
    ((1, 1), (640, 640)),
    ((1, 700), (1, 700)),
    ((700, 1), (700, 1)),
    ((2, 100), (13, 640)),
]


@pytest.mark.parametrize(("size", "expected"), SIZES)
def test_pictures_keep_their_size_or_are_enlarged(size, expected):
    rgb = flat(*size)
    prior = np.zeros(size, dtype=np.float32)
    masks = np.ones((2, *size), dtype=bool)
    for picture in (
        draw_overlay(rgb, no_masks(*size)),
        draw_overlay(rgb, masks),
        draw_heatmap(rgb, prior),
    ):
        assert (picture.height, picture.width) == expected
        assert picture.mode == "RGB"
    assert SHORTEST_LONG_SIDE == 640


def test_without_targets_the_picture_is_untouched():
    rgb = np.random.default_rng(0).integers(0, 256, (640, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(draw_overlay(rgb, no_masks(640, 30))), rgb)


def test_a_target_is_tinted_and_the_rest_is_dimmed():
    mask = square(640, 640, slice(200, 440), slice(200, 440))
    drawn = pixels(draw_overlay(flat(640, 640), mask[None]))
    inside = np.array(TARGET_COLORS[0]) * 0.35 + GREY * 0.65
    np.testing.assert_allclose(drawn[320, 320], inside, atol=1)
    np.testing.assert_allclose(drawn[20, 20], [GREY * 0.55] * 3, atol=1)


def test_a_target_is_outlined_in_its_full_color():
    mask = square(640, 640, slice(200, 440), slice(200, 440))
    drawn = pixels(draw_overlay(flat(640, 640), mask[None]))
    distance = np.abs(drawn - TARGET_COLORS[0]).max(axis=-1)
    for row, column in ((200, 320), (439, 320), (320, 200), (320, 439)):
        around = distance[row - 3 : row + 4, column - 3 : column + 4]
        assert around.min() < 40
    assert distance[320, 320] > 60
    assert distance[190:210, 100].min() > 60


def test_each_target_has_its_own_color():
    masks = np.stack(
        [square(640, 640, slice(40, 600), slice(100 * n, 100 * n + 90)) for n in range(6)]
    )
    drawn = pixels(draw_overlay(flat(640, 640), masks))
    for number in range(6):
        color = np.array(TARGET_COLORS[number % len(TARGET_COLORS)])
        np.testing.assert_allclose(
            drawn[320, 100 * number + 45], color * 0.35 + GREY * 0.65, atol=1
        )
    assert len(set(TARGET_COLORS)) == len(TARGET_COLORS) == 5


@pytest.mark.parametrize("is_target", [True, False])
def test_a_mask_of_everything_or_nothing_is_drawn(is_target):
    masks = np.full((1, 640, 640), is_target)
    drawn = pixels(draw_overlay(flat(640, 640), masks))
    color = np.array(TARGET_COLORS[0]) * 0.35 + GREY * 0.65 if is_target else [GREY * 0.55] * 3
    np.testing.assert_allclose(drawn[300:340, 300:340], np.broadcast_to(color, (40, 40, 3)), atol=1)


def test_a_small_mask_keeps_its_place_when_the_picture_is_enlarged():
    mask = square(16, 32, slice(0, 8), slice(16, 32))
    drawn = pixels(draw_overlay(flat(16, 32), mask[None]))
    assert drawn.shape == (320, 640, 3)
    inside = np.array(TARGET_COLORS[0]) * 0.35 + GREY * 0.65
    np.testing.assert_allclose(drawn[80, 480], inside, atol=2)
    for row, column in ((240, 480), (80, 160), (240, 160)):
        np.testing.assert_allclose(drawn[row, column], [GREY * 0.55] * 3, atol=2)


def test_drawing_changes_none_of_its_inputs():
    rgb, mask = flat(40, 40), square(40, 40, slice(5, 9), slice(5, 9))[None]
    prior = np.ones((40, 40), dtype=np.float32)
    draw_overlay(rgb, mask, "caption")
    draw_heatmap(rgb, prior)
    assert (rgb == GREY).all()
    assert mask.sum() == 16
    assert (prior == 1).all()


# Captions


def test_a_caption_stands_below_the_picture():
    rgb = flat(640, 640)
    plain = draw_overlay(rgb, no_masks(640, 640))
    framed = draw_overlay(rgb, no_masks(640, 640), "the red cup")
    assert framed.width == 640
    assert framed.height > 640
    np.testing.assert_array_equal(pixels(framed)[:640], pixels(plain))
    strip = pixels(framed)[640:]
    assert strip.max() > 200
    assert strip[0, 0].tolist() == strip[-1, -1].tolist() == [24, 24, 27]


def strip_height(caption):
    return draw_overlay(flat(640, 640), no_masks(640, 640), caption).height - 640


def test_a_long_caption_takes_more_lines_up_to_three():
    heights = [strip_height("word " * count) for count in (1, 20, 40, 100, 1_000)]
    assert heights[0] < heights[1] < heights[2] == heights[3] == heights[4]
    line = heights[1] - heights[0]
    assert heights[2] - heights[1] == line
    assert strip_height("x" * 500) == heights[0]


@pytest.mark.parametrize(
    "caption", [" ", "x" * 500, "größer 日本 🎉", "two\nlines", "<think>&amp;</think>"]
)
def test_every_caption_is_drawn(caption):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw_overlay(flat(30, 30), no_masks(30, 30), caption)
    assert picture.width == 640
    assert picture.height > 640


# Heatmaps


def heat_of(logit, value=GREY):
    prior = np.full((640, 640), logit, dtype=np.float32)
    return pixels(draw_heatmap(flat(640, 640, value), prior))[320, 320]


@pytest.mark.parametrize(
    ("logit", "color", "weight"),
    [
        (-100.0, HEAT_COLORS[0], 0.55),
        (-np.log(3), HEAT_COLORS[2], 0.6375),
        (0.0, HEAT_COLORS[4], 0.725),
        (np.log(3), HEAT_COLORS[6], 0.8125),
        (100.0, HEAT_COLORS[-1], 0.9),
    ],
)
def test_heat_is_on_a_fixed_scale(logit, color, weight):
    for value in (0, GREY, 255):
        expected = np.array(color) * weight + value * (1 - weight)
        np.testing.assert_allclose(heat_of(logit, value), expected, atol=1.5)


def test_more_heat_is_brighter():
    brightness = [heat_of(logit).sum() for logit in (-8, -3, -1, 0, 1, 3, 8)]
    assert brightness == sorted(set(brightness))


def test_extreme_logits_do_not_overflow():
    prior = np.array([[-1e30, 1e30], [-50, np.finfo(np.float32).max]], dtype=np.float32)
    with np.errstate(all="raise"):
        drawn = pixels(draw_heatmap(flat(2, 2), prior))
    assert drawn[10, 10].sum() < drawn[10, -10].sum()


def test_the_picture_behind_the_heat_is_grey():
    red, blue = flat(640, 640), flat(640, 640)
    red[:] = np.asarray(Image.new("RGB", (1, 1), (200, 0, 0)))
    blue[:] = np.asarray(Image.new("L", (1, 1), 60).convert("RGB"))  # as bright as that red
    prior = np.zeros((640, 640), dtype=np.float32)
    difference = np.abs(pixels(draw_heatmap(red, prior)) - pixels(draw_heatmap(blue, prior)))
    assert difference.max() <= 1


def test_heat_stands_where_the_prior_is_high():
    prior = np.full((32, 16), -6, dtype=np.float32)
    prior[20:28, 2:10] = 6
    drawn = pixels(draw_heatmap(flat(32, 16), prior)).sum(axis=-1)
    assert drawn.shape == (640, 320)
    assert drawn[480, 120] > drawn[200, 120] + 200
    assert drawn[480, 120] > drawn[480, 290] + 200
