"""Drawing of overlays, heat maps, captions and grids."""

import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from coprs_deploy import visualization
from coprs_deploy.logits import sigmoid
from coprs_deploy.visualization import (
    HEAT_COLORS,
    MAX_LONG_SIDE_PX,
    MIN_LONG_SIDE_PX,
    TARGET_COLORS,
    colorize,
    draw_grid,
    draw_heatmap,
    draw_overlay,
    outline_band,
    wrap_text,
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


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


SIZES = [
    ((640, 480), (640, 480)),
    ((900, 1200), (768, 1024)),
    ((64, 32), (640, 320)),
    ((32, 64), (320, 640)),
    ((1, 1), (640, 640)),
    ((1, 700), (1, 700)),
    ((3, 8500), (1, 1024)),
    ((700, 1), (700, 1)),
    ((2, 100), (13, 640)),
]


@pytest.mark.parametrize(("size", "expected"), SIZES)
def test_drawing_enlarges_small_images_and_reduces_large_ones(size, expected):
    rgb = flat(*size)
    prior = np.zeros(size, dtype=np.float32)
    masks = np.ones((2, *size), dtype=bool)
    for drawn in (
        draw_overlay(rgb, no_masks(*size)),
        draw_overlay(rgb, masks),
        draw_heatmap(rgb, prior),
    ):
        assert (drawn.height, drawn.width) == expected
        assert drawn.mode == "RGB"
    assert MIN_LONG_SIDE_PX == 640


def test_overlay_without_targets_is_the_image():
    rgb = np.random.default_rng(0).integers(0, 256, (640, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(draw_overlay(rgb, no_masks(640, 30))), rgb)


def test_overlay_tints_the_target_and_dims_the_background():
    mask = square(640, 640, slice(200, 440), slice(200, 440))
    drawn = pixels(draw_overlay(flat(640, 640), mask[None]))
    inside = np.array(TARGET_COLORS[0]) * 0.35 + GREY * 0.65
    np.testing.assert_allclose(drawn[320, 320], inside, atol=1)
    np.testing.assert_allclose(drawn[20, 20], [GREY * 0.55] * 3, atol=1)


def test_overlay_outlines_the_target_in_its_full_color():
    mask = square(640, 640, slice(200, 440), slice(200, 440))
    drawn = pixels(draw_overlay(flat(640, 640), mask[None]))
    distance = np.abs(drawn - TARGET_COLORS[0]).max(axis=-1)
    for row, column in ((200, 320), (439, 320), (320, 200), (320, 439)):
        around = distance[row - 3 : row + 4, column - 3 : column + 4]
        assert around.min() < 40
    assert distance[320, 320] > 60
    assert distance[190:210, 100].min() > 60


def test_overlay_gives_each_target_its_own_color():
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
def test_overlay_draws_full_and_empty_masks(is_target):
    masks = np.full((1, 640, 640), is_target)
    drawn = pixels(draw_overlay(flat(640, 640), masks))
    color = np.array(TARGET_COLORS[0]) * 0.35 + GREY * 0.65 if is_target else [GREY * 0.55] * 3
    np.testing.assert_allclose(drawn[300:340, 300:340], np.broadcast_to(color, (40, 40, 3)), atol=1)


def test_overlay_keeps_the_mask_in_place_when_the_image_is_enlarged():
    mask = square(16, 32, slice(0, 8), slice(16, 32))
    drawn = pixels(draw_overlay(flat(16, 32), mask[None]))
    assert drawn.shape == (320, 640, 3)
    inside = np.array(TARGET_COLORS[0]) * 0.35 + GREY * 0.65
    np.testing.assert_allclose(drawn[80, 480], inside, atol=2)
    for row, column in ((240, 480), (80, 160), (240, 160)):
        np.testing.assert_allclose(drawn[row, column], [GREY * 0.55] * 3, atol=2)


def test_drawing_does_not_change_its_inputs():
    rgb, mask = flat(40, 40), square(40, 40, slice(5, 9), slice(5, 9))[None]
    prior = np.ones((40, 40), dtype=np.float32)
    draw_overlay(rgb, mask, "caption")
    draw_heatmap(rgb, prior)
    assert (rgb == GREY).all()
    assert mask.sum() == 16
    assert (prior == 1).all()


# Captions


def test_caption_is_below_the_image():
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


def test_long_caption_takes_up_to_three_lines():
    heights = [strip_height("word " * count) for count in (1, 20, 40, 100, 1_000)]
    assert heights[0] < heights[1] < heights[2] == heights[3] == heights[4]
    line = heights[1] - heights[0]
    assert heights[2] - heights[1] == line
    assert strip_height("x" * 500) == heights[0]


@pytest.mark.parametrize(
    "caption", [" ", "x" * 500, "größer 日本 🎉", "two\nlines", "<think>&amp;</think>"]
)
def test_any_caption_is_drawn_without_a_warning(caption):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_overlay(flat(30, 30), no_masks(30, 30), caption)
    assert drawn.width == 640
    assert drawn.height > 640


def strip(caption):
    return pixels(draw_overlay(flat(640, 640), no_masks(640, 640), caption))[640:]


@pytest.fixture
def without_installed_fonts(monkeypatch):
    monkeypatch.setattr(visualization, "FALLBACK_FONTS", ())


@pytest.mark.parametrize(
    ("caption", "drawn"),
    [
        ("最大的红色圆圈", "(no font for 7 of 7 characters)"),
        ("أكبر", "(no font for 4 of 4 characters)"),
        ("הגדול", "(no font for 5 of 5 characters)"),
        ("हिन्दी", "(no font for 6 of 6 characters)"),
        ("the cup 🎉", "the cup (no font for 1 of 7 characters)"),
        ("the \u200bcup\ufe0f", "the cup"),
    ],
)
@pytest.mark.usefixtures("without_installed_fonts")
def test_caption_leaves_out_what_no_font_has(caption, drawn):
    np.testing.assert_array_equal(strip(caption), strip(drawn))


def test_caption_is_drawn_with_the_font_that_has_its_characters(monkeypatch):
    name = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    monkeypatch.setattr(visualization, "FALLBACK_FONTS", ("nowhere.ttf", str(name)))
    font = ImageFont.truetype(str(name), 17)
    for text in ("Самый большой круг", "העיגול הגדול"):
        expected = Image.new("RGB", (640, 39), (24, 24, 27))
        ImageDraw.Draw(expected).text((8, 8), text, font=font, fill=(244, 244, 245))
        np.testing.assert_array_equal(strip(text), pixels(expected))


def test_caption_without_text_layout_leaves_out_text_from_right_to_left(monkeypatch):
    name = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    monkeypatch.setattr(visualization, "FALLBACK_FONTS", (str(name),))
    monkeypatch.setattr(features, "check", lambda feature: False)
    np.testing.assert_array_equal(strip("הגדול"), strip("(no font for 5 of 5 characters)"))


def test_caption_of_a_megabyte_is_drawn_in_its_usual_time():
    start = time.thread_time()
    strip("x" * 1_000_000)
    assert time.thread_time() - start < 2


# Heatmaps


def heat_of(logit, value=GREY):
    prior = sigmoid(np.full((640, 640), logit, dtype=np.float32))
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
def test_heatmap_has_a_fixed_scale(logit, color, weight):
    for value in (0, GREY, 255):
        expected = np.array(color) * weight + value * (1 - weight)
        np.testing.assert_allclose(heat_of(logit, value), expected, atol=1.5)


def test_heatmap_is_brighter_for_higher_values():
    brightness = [heat_of(logit).sum() for logit in (-8, -3, -1, 0, 1, 3, 8)]
    assert brightness == sorted(set(brightness))


def test_heatmap_of_extreme_logits_does_not_overflow():
    prior = np.array([[-1e30, 1e30], [-50, np.finfo(np.float32).max]], dtype=np.float32)
    with np.errstate(all="raise"):
        drawn = pixels(draw_heatmap(flat(2, 2), sigmoid(prior)))
    assert drawn[10, 10].sum() < drawn[10, -10].sum()


def test_heatmap_background_is_grey():
    red, blue = flat(640, 640), flat(640, 640)
    red[:] = np.asarray(Image.new("RGB", (1, 1), (200, 0, 0)))
    blue[:] = np.asarray(Image.new("L", (1, 1), 60).convert("RGB"))  # as bright as that red
    prior = np.zeros((640, 640), dtype=np.float32)
    difference = np.abs(pixels(draw_heatmap(red, prior)) - pixels(draw_heatmap(blue, prior)))
    assert difference.max() <= 1


def test_heatmap_is_bright_where_the_prior_is_high():
    prior = np.zeros((32, 16), dtype=np.float32)
    prior[20:28, 2:10] = 1
    drawn = pixels(draw_heatmap(flat(32, 16), prior)).sum(axis=-1)
    assert drawn.shape == (640, 320)
    assert drawn[480, 120] > drawn[200, 120] + 200
    assert drawn[480, 120] > drawn[480, 290] + 200


# Primitives


def test_colorize_gives_the_anchor_colors_at_equal_steps():
    steps = np.linspace(0, 1, len(HEAT_COLORS))[None]
    np.testing.assert_allclose(colorize(steps)[0], HEAT_COLORS)


def test_outline_band_surrounds_the_mask_outside_of_its_edge():
    mask = square(50, 50, slice(20, 30), slice(10, 40))
    band = outline_band(mask, (100, 100), 3)
    enlarged = square(100, 100, slice(40, 60), slice(20, 80))
    around = square(100, 100, slice(38, 62), slice(18, 82))
    assert np.array_equal(band, around & ~enlarged)


def test_wrap_text_keeps_the_words_and_the_width():
    text = "the large red circle behind the small blue square " * 3
    lines = wrap_text(text, 17, 200)
    assert " ".join(lines) == text.strip()
    assert len(lines) > 3
    assert wrap_text("", 17, 200) == [""]
    (cut,) = wrap_text("x" * 500, 17, 200)
    assert cut.endswith("\u2026")


def test_draw_grid_scales_images_into_square_tiles():
    red = Image.new("RGB", (200, 100), (255, 0, 0))
    sheet = pixels(draw_grid([[red, red], [red]], 50))
    assert sheet.shape == (100, 100, 3)
    assert (sheet[:25] == (255, 0, 0)).all()
    assert (sheet[50:75, :50] == (255, 0, 0)).all()
    assert not sheet[25:50].any() and not sheet[50:, 50:].any()


@pytest.mark.parametrize("shape", [(2000, 3000), (9000, 30), (1, 4000)])
def test_drawings_of_a_large_image_have_a_bounded_size(shape):
    image = np.zeros((*shape, 3), np.uint8)
    mask = np.zeros((1, *shape), np.bool_)
    mask[:, : shape[0] // 2, : shape[1] // 2] = True
    overlay, heatmap = draw_overlay(image, mask), draw_heatmap(image, mask[0].astype(np.float32))
    assert overlay.size == heatmap.size
    assert max(overlay.size) == MAX_LONG_SIDE_PX
    last = (overlay.width - 1, overlay.height - 1)
    assert overlay.getpixel(last) == (0, 0, 0)  # black, dimmed or not
    assert mask.any() == (np.asarray(overlay).max() > 0)


@pytest.mark.parametrize("shape", [(3000, 4000), (200, 60_000)])
def test_drawings_of_a_large_image_take_a_fraction_of_a_second(shape):
    """Of 12 megapixels, 0.1 s on an idle core; the rank filters took 20 s."""
    image = np.zeros((*shape, 3), np.uint8)
    mask = np.zeros((1, *shape), np.bool_)
    mask[:, 50:-50, 50:-50] = True
    prior = np.zeros(shape, np.float32)
    for draw in (lambda: draw_overlay(image, mask), lambda: draw_heatmap(image, prior)):
        start = time.thread_time()
        draw()
        assert time.thread_time() - start < 1
