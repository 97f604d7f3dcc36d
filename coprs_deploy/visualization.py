"""Drawing of masks, heat maps and contact sheets with Pillow, from arrays and strings.

Small images are enlarged so that outlines and heat maps can be seen; large ones are reduced, so
that a drawing takes tens of milliseconds at any size. Nothing here is used to measure anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

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

CAPTION_INK: Color = (244, 244, 245)
CAPTION_BACKGROUND: Color = (24, 24, 27)
MAX_CAPTION_LINES = 3

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
    size = _display_size(image)
    image = _decimate(image)
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=1.5)
    canvas = np.asarray(resized, dtype=np.float32)
    line_px = max(2, round(max(size) / 320))
    covered = np.zeros(canvas.shape[:2], dtype=np.float32)
    layers = [_smooth_mask(_decimate(mask), size) for mask in masks]
    for inside in layers:
        covered = np.maximum(covered, inside)
    canvas = canvas * (1 - 0.45 * (1 - covered) * bool(layers))[..., None]
    for number, inside in enumerate(layers):
        color = TARGET_COLORS[number % len(TARGET_COLORS)]
        _blend(canvas, color, 0.35 * inside)
        _blend(canvas, WHITE, _edge(inside, 2 * line_px))
        _blend(canvas, color, _edge(inside, line_px))
    drawn = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return add_caption(drawn, caption) if caption else drawn


def draw_heatmap(image: RgbArray, prior: NDArray[np.float32]) -> Image.Image:
    """Draw a heat map over a grey image on a fixed scale: black is 0, pale yellow is 1.

    Args:
        image: (H, W, 3) uint8 RGB.
        prior: (H, W) float32 in [0, 1].

    Returns:
        The drawing, enlarged if the image is small and reduced if it is large.
    """
    size = _display_size(image)
    image, prior = _decimate(image), _decimate(prior)
    grey = Image.fromarray(image).convert("L")
    grey = grey.resize(size, Image.Resampling.LANCZOS, reducing_gap=1.5)
    heat = Image.fromarray(prior).resize(size, Image.Resampling.BICUBIC, reducing_gap=1.5)
    probability = np.clip(np.asarray(heat), 0, 1)
    weight = (0.55 + 0.35 * probability)[..., None]
    background = np.asarray(grey, dtype=np.float32)[..., None] * (1 - weight)
    blended = background + colorize(probability) * weight
    return Image.fromarray(np.clip(blended, 0, 255).astype(np.uint8))


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
    """Add a strip with up to three lines of text below an image."""
    font_px = max(14, image.width // 36)
    margin = font_px // 2
    texts = wrap_text(caption, font_px, image.width - 2 * margin)
    if len(texts) > MAX_CAPTION_LINES:
        texts = [*texts[: MAX_CAPTION_LINES - 1], texts[MAX_CAPTION_LINES - 1] + " ..."]
    lines = [TextLine(text, font_px, CAPTION_INK) for text in texts]
    height = sum(line.height for line in lines) + 2 * margin
    framed = Image.new("RGB", (image.width, image.height + height), CAPTION_BACKGROUND)
    framed.paste(image, (0, 0))
    draw_text(framed, lines, margin, image.height + margin)
    return framed


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
    font = ImageFont.load_default(font_px)
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


def _display_size(image: RgbArray) -> tuple[int, int]:
    """Return width and height in pixels of the drawing."""
    height, width = image.shape[:2]
    long_side = max(height, width)
    factor = min(max(1.0, MIN_LONG_SIDE_PX / long_side), MAX_LONG_SIDE_PX / long_side)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _decimate(pixels: NDArray[Any]) -> NDArray[Any]:
    """Keep every n-th row and column of a large array, at least 1.5 times those of a drawing."""
    step = max(1, 2 * max(pixels.shape[:2]) // (3 * MAX_LONG_SIDE_PX))
    return np.ascontiguousarray(pixels[::step, ::step])


def _smooth_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a mask to ``size`` (width, height) with soft edges: coverage in [0, 1]."""
    coverage = Image.fromarray(mask.astype(np.uint8) * 255)
    resized = coverage.resize(size, Image.Resampling.BICUBIC, reducing_gap=1.5)
    if size[0] > mask.shape[1]:  # round the steps of enlarged pixels
        resized = resized.filter(ImageFilter.GaussianBlur(0.35 * size[0] / mask.shape[1]))
    soft = np.asarray(resized, dtype=np.float32) / np.float32(255)
    inside: NDArray[np.float32] = np.clip((soft - 0.5) * 4 + 0.5, 0, 1).astype(np.float32)
    return inside


def _edge(inside: NDArray[np.float32], line_px: int) -> NDArray[np.float32]:
    """Return weights in [0, 1] of the edge of a smooth mask, about ``line_px`` wide."""
    solid = Image.fromarray((inside > 0.5).astype(np.uint8) * 255)
    # Between 0 and 255 where the square around a pixel lies on both sides of the edge: the rank
    # filters give the same band at a cost that grows with the square's area.
    mean = np.asarray(solid.filter(ImageFilter.BoxBlur(line_px // 2)))
    band = ((mean > 0) & (mean < 255)).astype(np.uint8) * 255
    edge = Image.fromarray(band).filter(ImageFilter.GaussianBlur(0.7))
    return np.asarray(edge, dtype=np.float32) / np.float32(255)


def _blend(canvas: NDArray[np.float32], color: Color, weight: NDArray[np.float32]) -> None:
    """Mix a color into a canvas in place, by weight per pixel."""
    rows, columns = np.flatnonzero(weight.any(axis=1)), np.flatnonzero(weight.any(axis=0))
    if len(rows):
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        canvas[box] += (np.array(color, dtype=np.float32) - canvas[box]) * weight[box][..., None]
