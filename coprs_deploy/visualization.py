"""Pictures of an answer for people: the mask over the picture, and the prior as a heatmap.

Small pictures are enlarged, so that outlines and heat can be seen. Nothing here is measured with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from coprs_deploy.images import RgbArray

SHORTEST_LONG_SIDE = 640
"""Pixels; a picture whose longer side is shorter is enlarged to this."""

TARGET_COLORS = ((255, 64, 129), (0, 200, 255), (255, 196, 0), (118, 255, 3), (170, 120, 255))
"""RGB of the first targets; they repeat after the last."""

WHITE = np.full(3, 255, dtype=np.float32)
"""Drawn around each outline, so that it stands out on a target of its own color."""

HEAT_COLORS = (
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
"""RGB from 0 to 1 in equal steps: dark to bright with even lightness (the inferno scale)."""


def draw_overlay(rgb: RgbArray, masks: NDArray[np.bool_], caption: str = "") -> Image.Image:
    """Draw masks over a picture: the rest is dimmed, each target tinted and outlined.

    Args:
        rgb: (H, W, 3) uint8.
        masks: (N, H, W) bool; N may be 0.
        caption: written below the picture; empty leaves the strip out.

    Returns:
        The picture, enlarged if it is small.
    """
    size = _display_size(rgb)
    picture = Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS)
    canvas = np.asarray(picture, dtype=np.float32)
    line = max(2, round(max(size) / 320))
    covered = np.zeros(canvas.shape[:2], dtype=np.float32)
    layers = [_smooth_mask(mask, size) for mask in masks]
    for inside in layers:
        covered = np.maximum(covered, inside)
    canvas = canvas * (1 - 0.45 * (1 - covered) * bool(layers))[..., None]
    for number, inside in enumerate(layers):
        outline, halo = _outline(inside, line), _outline(inside, 2 * line)
        color = np.array(TARGET_COLORS[number % len(TARGET_COLORS)], dtype=np.float32)
        for paint, weight in ((color, 0.35 * inside), (WHITE, halo), (color, outline)):
            canvas += (paint - canvas) * weight[..., None]
    drawn = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    return _with_caption(drawn, caption) if caption else drawn


def draw_heatmap(rgb: RgbArray, prior: NDArray[np.float32]) -> Image.Image:
    """Draw a prior over the picture in grey, on a fixed scale: black is 0, pale yellow is 1.

    Args:
        rgb: (H, W, 3) uint8.
        prior: (H, W) float32 logits.

    Returns:
        The picture, enlarged if it is small.
    """
    size = _display_size(rgb)
    grey = Image.fromarray(rgb).convert("L").resize(size, Image.Resampling.LANCZOS)
    heat = Image.fromarray(_sigmoid(prior)).resize(size, Image.Resampling.BICUBIC)
    probability = np.clip(np.asarray(heat), 0, 1)
    scale = np.linspace(0, 1, len(HEAT_COLORS))
    anchors = np.asarray(HEAT_COLORS, dtype=np.float32)
    color = np.stack([np.interp(probability, scale, anchors[:, i]) for i in range(3)], axis=-1)
    weight = (0.55 + 0.35 * probability)[..., None]
    blended = np.asarray(grey, dtype=np.float32)[..., None] * (1 - weight) + color * weight
    return Image.fromarray(np.clip(blended, 0, 255).astype(np.uint8))


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * logits))  # never overflows
    return result


def _display_size(rgb: RgbArray) -> tuple[int, int]:
    """Width and height in pixels at which a picture is drawn."""
    height, width = rgb.shape[:2]
    factor = max(1.0, SHORTEST_LONG_SIDE / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _smooth_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.float32]:
    """Enlarge a mask with soft edges: how much each pixel is inside, 0 to 1."""
    grown = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    if size[0] > mask.shape[1]:  # round the steps that enlarging left
        grown = grown.filter(ImageFilter.GaussianBlur(0.35 * size[0] / mask.shape[1]))
    sharp = np.asarray(grown, dtype=np.float32) / np.float32(255)
    inside: NDArray[np.float32] = np.clip((sharp - 0.5) * 4 + 0.5, 0, 1).astype(np.float32)
    return inside


def _outline(inside: NDArray[np.float32], line: int) -> NDArray[np.float32]:
    """Trace the edge of a smooth mask about ``line`` pixels wide: weights from 0 to 1."""
    solid = Image.fromarray((inside > 0.5).astype(np.uint8) * 255)
    wide = np.asarray(solid.filter(ImageFilter.MaxFilter(2 * (line // 2) + 1)), dtype=np.float32)
    thin = np.asarray(solid.filter(ImageFilter.MinFilter(2 * (line // 2) + 1)), dtype=np.float32)
    edge = Image.fromarray((wide - thin).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    return np.asarray(edge, dtype=np.float32) / np.float32(255)


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    font_size = max(14, picture.width // 36)
    font = ImageFont.load_default(font_size)
    margin = font_size // 2
    lines = _wrap(caption, font, picture.width - 2 * margin)
    height = len(lines) * round(1.35 * font_size) + 2 * margin
    framed = Image.new("RGB", (picture.width, picture.height + height), (24, 24, 27))
    framed.paste(picture, (0, 0))
    draw = ImageDraw.Draw(framed)
    for number, text in enumerate(lines):
        position = (margin, picture.height + margin + number * round(1.35 * font_size))
        draw.text(position, text, font=font, fill=(244, 244, 245))
    return framed


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
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
    if len(lines) > 3:
        lines = [*lines[:2], lines[2] + " ..."]
    return lines
