"""Drawing of masks, heat maps and contact sheets with Pillow, from arrays and strings.

Small images are enlarged so that outlines and heat maps can be seen; large ones are reduced, so
that a drawing takes tens of milliseconds at any size. Nothing here is used to measure anything.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, features

from coprs_deploy.images import RgbArray

Color: TypeAlias = tuple[int, int, int]
"""RGB in 0..255."""

MIN_LONG_SIDE_PX = 640
"""Images with a shorter long side are enlarged to this."""

MAX_LONG_SIDE_PX = 1024
"""Images with a longer long side are drawn at this, so that the cost has a bound."""

TARGET_COLORS: tuple[Color, ...] = (
    (255, 64, 129),
    (0, 200, 255),
    (255, 196, 0),
    (118, 255, 3),
    (170, 120, 255),
)
"""Colors of the first targets, repeated for further ones."""

WHITE: Color = (255, 255, 255)
"""Halo around each outline, so that it stands out on a target of its own color."""

DIMMING = 0.55
"""Brightness of the background, as a share."""

TINT = 0.35
"""Share of its color in a target."""

NUM_HEAT_LEVELS = 1024
"""Steps of a heat map, finer than those of 8-bit colors."""

CAPTION_INK: Color = (244, 244, 245)
CAPTION_BACKGROUND: Color = (24, 24, 27)
MAX_CAPTION_LINES = 3
MAX_CAPTION_LENGTH = 500
"""Characters of a caption that are drawn; three lines hold fewer."""

FALLBACK_FONTS = (
    "DejaVuSans.ttf",  # Linux: Greek, Cyrillic, Hebrew, Arabic
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",  # macOS
    "msyh.ttc",  # Windows: Chinese
    "arial.ttf",
)
"""Installed fonts that are tried for characters that Pillow's own font lacks."""

NO_CHARACTER = "\U0010ffff"
"""A code point that is never assigned: fonts draw their box for missing characters."""

LINE_SPACING = 1.35
"""Line height as a multiple of the font size."""

HEAT_COLORS: tuple[Color, ...] = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
"""Colors from 0 to 1 in equal steps (the inferno colormap)."""


def draw_overlay(image: RgbArray, masks: NDArray[np.bool_], caption: str = "") -> Image.Image:
    """Draw masks over an image: the background dimmed, each target tinted and outlined.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: (N, H, W) bool; N may be 0.
        caption: text below the image; empty for none.

    Returns:
        The drawing, enlarged if the image is small and reduced if it is large.
    """
    canvas = _resize_to_display(image)
    line_px = max(2, round(max(canvas.size) / 320))
    layers = [_smooth_mask(_decimate(mask), canvas.size) for mask in masks]
    if layers:
        dimmed = canvas.point(lambda value: round(DIMMING * value))
        canvas = Image.composite(canvas, dimmed, reduce(ImageChops.lighter, layers))
    for number, inside in enumerate(layers):
        color = TARGET_COLORS[number % len(TARGET_COLORS)]
        box = _box_around(inside, 2 * line_px)
        part = inside.crop(box)
        canvas.paste(color, box, part.point(lambda value: round(TINT * value)))
        canvas.paste(WHITE, box, _edge(part, 2 * line_px))
        canvas.paste(color, box, _edge(part, line_px))
    return add_caption(canvas, caption) if caption else canvas


def draw_heatmap(image: RgbArray, prior: NDArray[np.float32]) -> Image.Image:
    """Draw a heat map over a grey image on a fixed scale: black is 0, pale yellow is 1.

    Args:
        image: (H, W, 3) uint8 RGB.
        prior: (H, W) float32 in [0, 1].

    Returns:
        The drawing, enlarged if the image is small and reduced if it is large.
    """
    grey = _resize_to_display(image).convert("L")
    heat = Image.fromarray(_decimate(prior))
    heat = heat.resize(grey.size, Image.Resampling.BICUBIC, reducing_gap=1.5)
    levels = np.linspace(0, 1, NUM_HEAT_LEVELS, dtype=np.float32)
    weights = (0.55 + 0.35 * levels)[:, None]
    colors = (colorize(levels[None])[0] * weights).astype(np.float32)
    index = np.clip(np.rint(np.asarray(heat) * (NUM_HEAT_LEVELS - 1)), 0, NUM_HEAT_LEVELS - 1)
    index = index.astype(np.int16)
    background = (1 - weights)[index] * np.asarray(grey, dtype=np.float32)[..., None]
    blended = colors[index] + background
    return Image.fromarray(blended.astype(np.uint8))


def colorize(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Map values in [0, 1], (H, W), to ``HEAT_COLORS``: (H, W, 3) in 0..255."""
    positions = np.linspace(0, 1, len(HEAT_COLORS))
    colors = np.asarray(HEAT_COLORS, dtype=np.float32)
    return np.stack([np.interp(values, positions, colors[:, i]) for i in range(3)], axis=-1)


def outline_band(mask: NDArray[np.bool_], size: tuple[int, int], line_px: int) -> NDArray[np.bool_]:
    """Select the pixels around a mask, outside of its edge.

    Args:
        mask: (H, W) bool.
        size: width and height of the drawing.
        line_px: width of the band.

    Returns:
        (size[1], size[0]) bool.
    """
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    solid = resized.point(lambda value: 255 if value > 127 else 0)
    wide = solid.filter(ImageFilter.MaxFilter(2 * line_px - 1))
    return np.asarray(wide) > np.asarray(solid)


def add_caption(image: Image.Image, caption: str) -> Image.Image:
    """Add a strip with up to three lines of text below an image.

    The font is Pillow's own, or an installed one that has more of the characters. Characters that
    no font has are left out, and the caption says how many.
    """
    font_px = max(14, image.width // 36)
    margin = font_px // 2
    caption, font = _drawable(caption[:MAX_CAPTION_LENGTH], font_px)
    texts = _wrap(caption, font, image.width - 2 * margin)
    if len(texts) > MAX_CAPTION_LINES:
        texts = [*texts[: MAX_CAPTION_LINES - 1], texts[MAX_CAPTION_LINES - 1] + " ..."]
    line_height = round(LINE_SPACING * font_px)
    height = len(texts) * line_height + 2 * margin
    framed = Image.new("RGB", (image.width, image.height + height), CAPTION_BACKGROUND)
    framed.paste(image, (0, 0))
    draw = ImageDraw.Draw(framed)
    for number, text in enumerate(texts):
        top = image.height + margin + number * line_height
        draw.text((margin, top), text, font=font, fill=CAPTION_INK)
    return framed


def _default_font(font_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(font_px)
    assert isinstance(font, ImageFont.FreeTypeFont), "a size selects Pillow's scalable font"
    return font


def _drawable(text: str, font_px: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text without the characters that no font has, and the font to draw it with."""
    fonts = [_default_font(font_px)]
    missing = _missing(text, fonts[0])
    for name in FALLBACK_FONTS if missing else ():
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, font_px))
    font = min(fonts, key=lambda font: len(_missing(text, font)))
    missing = _missing(text, font)
    drawn = "".join(character for character in text if character not in missing)
    count = sum(character in missing and not _is_invisible(character) for character in text)
    num_visible = len("".join(text.split()))
    note = f" (no font for {count} of {num_visible} characters)" if count else ""
    return (drawn + note).strip(), font


def _missing(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    """Return the characters that a font draws as a box, or that Pillow cannot lay out."""
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    box = bytes(plain.getmask(NO_CHARACTER))
    missing = {c for c in set(text) if not c.isspace() and bytes(plain.getmask(c)) == box}
    if features.check("raqm"):
        return missing
    return missing | {c for c in text if unicodedata.bidirectional(c) in ("R", "AL")}


def _is_invisible(character: str) -> bool:
    """Whether a character is a joiner, a mark of direction or a variation selector."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


@dataclass(frozen=True)
class TextLine:
    """A line of text.

    Attributes:
        text: the text.
        font_px: font size in pixels.
        color: color of the text.
    """

    text: str
    font_px: int
    color: Color

    @property
    def height(self) -> int:
        """Line height in pixels."""
        return round(LINE_SPACING * self.font_px)


def wrap_text(text: str, font_px: int, width: int) -> list[str]:
    """Break text into lines of at most ``width`` pixels; longer words are cut with an ellipsis."""
    return _wrap(text, _default_font(font_px), width)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for piece in text.split():
        word = piece
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-2] + "\u2026"
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_text(image: Image.Image, lines: Sequence[TextLine], left: int, top: int) -> None:
    """Draw lines of text onto an image, one below the other, from the top left corner."""
    draw = ImageDraw.Draw(image)
    for line in lines:
        font = ImageFont.load_default(line.font_px)
        draw.text((left, top), line.text, font=font, fill=line.color)
        top += line.height


def draw_grid(rows: Sequence[Sequence[Image.Image]], side_px: int) -> Image.Image:
    """Arrange images in a grid of square tiles, each scaled down to fit; padding is black."""
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * side_px, len(rows) * side_px))
    for row_number, row in enumerate(rows):
        for column, image in enumerate(row):
            tile = image.copy()
            tile.thumbnail((side_px, side_px))
            sheet.paste(tile, (column * side_px, row_number * side_px))
    return sheet


def _resize_to_display(image: RgbArray) -> Image.Image:
    """Resize an image to the size of its drawing."""
    height, width = image.shape[:2]
    long_side = max(height, width)
    factor = min(max(1.0, MIN_LONG_SIDE_PX / long_side), MAX_LONG_SIDE_PX / long_side)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = Image.Resampling.LANCZOS if factor >= 1 else Image.Resampling.BICUBIC
    return Image.fromarray(_decimate(image)).resize(size, method, reducing_gap=1.5)


def _decimate(pixels: NDArray[Any]) -> NDArray[Any]:
    """Keep every n-th row and column of a large array, at least 1.5 times those of a drawing."""
    step = max(1, 2 * max(pixels.shape[:2]) // (3 * MAX_LONG_SIDE_PX))
    return np.ascontiguousarray(pixels[::step, ::step])


def _smooth_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """Resize a mask to ``size`` (width, height) with soft edges: coverage in 0..255."""
    coverage = Image.fromarray(mask.astype(np.uint8) * 255)
    resized = coverage.resize(size, Image.Resampling.BICUBIC, reducing_gap=1.5)
    if size[0] > mask.shape[1]:  # round the steps of enlarged pixels
        resized = resized.filter(ImageFilter.GaussianBlur(0.35 * size[0] / mask.shape[1]))
    return resized.point(lambda value: min(max(4 * value - 383, 0), 255))


def _box_around(inside: Image.Image, margin_px: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what is not 0, with a margin."""
    left, top, right, bottom = inside.getbbox() or (0, 0, 1, 1)
    return (
        max(0, left - margin_px),
        max(0, top - margin_px),
        min(inside.width, right + margin_px),
        min(inside.height, bottom + margin_px),
    )


def _edge(inside: Image.Image, line_px: int) -> Image.Image:
    """Return weights in 0..255 of the edge of a smooth mask, about ``line_px`` wide."""
    solid = inside.point(lambda value: 255 * (value > 127))
    # Between 0 and 255 where the square around a pixel lies on both sides of the edge: the rank
    # filters give the same band at a cost that grows with the square's area.
    mean = solid.filter(ImageFilter.BoxBlur(line_px // 2))
    return mean.point(lambda value: 255 * (0 < value < 255)).filter(ImageFilter.BoxBlur(0.3))
