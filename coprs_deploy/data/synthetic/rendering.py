"""Painting: backgrounds, textured objects over them, and the camera's noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.data.synthetic.layout import SAMPLES_PER_SIDE, Layout, Sketch, Stamp, sum_samples
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rng import Draws
from coprs_deploy.images import RgbArray

DARK_SHARE = 0.56
"""How much light the dark parts of a texture lose."""

COLOR_SHIFT = 12.0
"""Largest shift of an object's color, in each channel."""

LIGHTNESS_NOISE = 4.0
COLOR_NOISE = 2.5
"""Standard deviations in 0..255 of the noise over the whole picture."""

BACKGROUND_LIGHTNESS = (26.0, 112.0)
BACKGROUND_TINT = 20.0
"""Backgrounds are dim and greyish: no object has such a color."""


def paint(layout: Layout, tier: Preset, draws: Draws) -> RgbArray:
    """Paint a layout.

    Args:
        layout: what to paint.
        tier: image size and kinds of background.
        draws: where every random choice comes from.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    canvas = _paint_background(draws.choice(tier.backgrounds), tier.image_size, draws)
    for sketch, stamp in zip(layout.sketches, layout.stamps, strict=True):
        window = canvas[stamp.rows, stamp.columns]
        coverage = stamp.coverage.astype(np.float32) / SAMPLES_PER_SIDE**2
        window += coverage[..., None] * (_paint_object(sketch, stamp, tier, draws) - window)
    size = tier.image_size
    canvas += LIGHTNESS_NOISE * draws.noise(size, size, 1)
    canvas += COLOR_NOISE * draws.noise(size, size, 3)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas.astype(np.uint8)


def _paint_object(sketch: Sketch, stamp: Stamp, tier: Preset, draws: Draws) -> NDArray[np.float32]:
    """Color the whole window of a stamp: (h, w, 3) float32 in 0..255."""
    base = np.array(vocabulary.COLORS[sketch.color], dtype=np.float32)
    color = base + COLOR_SHIFT * draws.array(3)
    middle = SAMPLES_PER_SIDE // 2
    x, y = stamp.x[:, middle::SAMPLES_PER_SIDE], stamp.y[middle::SAMPLES_PER_SIDE]
    light_x, light_y = draws.direction()
    light = 1 + tier.shading * ((x * light_x + y * light_y) / sketch.radius).astype(np.float32)
    dark = _dark_samples(sketch.texture, stamp, tier.texture_period * tier.image_size, draws)
    if dark is not None:
        samples = sum_samples((dark & stamp.inside).view(np.uint8))
        share = samples / np.maximum(stamp.coverage, 1).astype(np.float32)
        light = light * (1 - DARK_SHARE * share)
    painted: NDArray[np.float32] = light[..., None] * color
    return painted


def _dark_samples(
    texture: str, stamp: Stamp, period: float, draws: Draws
) -> NDArray[np.bool_] | None:
    """Say which samples a texture darkens, (3h, 3w) bool; None for a plain one."""
    period *= draws.uniform(0.9, 1.15)
    x, y = (
        axis / np.float32(period) + np.float32(draws.uniform(0, 1)) for axis in (stamp.x, stamp.y)
    )
    dark: NDArray[np.bool_] | None = None
    if texture == "striped":
        step_x, step_y = draws.choice(((1.0, 0.0), (0.0, 1.0), (0.707, 0.707), (0.707, -0.707)))
        along = x * np.float32(step_x) + y * np.float32(step_y)
        dark = along - np.floor(along) < np.float32(0.5)
    elif texture == "checkered":
        # Squares of 0.8 periods, so that a small object shows several.
        dark = (np.floor(x / np.float32(0.8)) + np.floor(y / np.float32(0.8))) % 2 < 1
    elif texture == "dotted":
        from_dot_x, from_dot_y = x - np.floor(x) - 0.5, y - np.floor(y) - 0.5
        dark = from_dot_x**2 + from_dot_y**2 < np.float32(0.1)
    else:
        assert texture == "plain", f"no paint for {texture!r}"
    return dark


def _paint_background(kind: str, size: int, draws: Draws) -> NDArray[np.float32]:
    """Return (size, size, 3) float32."""
    base = draws.uniform(*BACKGROUND_LIGHTNESS) + BACKGROUND_TINT * draws.array(3)
    tint = 1 + 0.35 * draws.array(3)
    painted: NDArray[np.float32] = base + _relief(kind, size, draws)[..., None] * tint
    return painted


def _relief(kind: str, size: int, draws: Draws) -> NDArray[np.float32]:
    """Return what a background adds to its base color, (size, size) float32 around 0."""
    x, y = _pixel_centers(size)
    relief: NDArray[np.floating] = np.zeros((size, size), dtype=np.float32)
    if kind == "gradient":
        step_x, step_y = draws.direction()
        relief = draws.uniform(20, 45) * ((x - 0.5) * step_x + (y - 0.5) * step_y)
    elif kind == "grain":
        coarse = draws.noise(size // 2, size // 2).repeat(2, axis=0).repeat(2, axis=1)
        relief = draws.uniform(5, 9) * coarse
    elif kind == "blobs":
        relief = draws.uniform(16, 24) * _smooth_field(6, size, draws)
    elif kind == "clouds":
        relief = 20 * _smooth_field(4, size, draws) + 12 * _smooth_field(16, size, draws)
    elif kind == "stripes":
        step_x, step_y = draws.direction()
        along = (x * step_x + y * step_y) * draws.uniform(5, 11) + 4
        relief = draws.uniform(28, 48) * (np.abs(along % 1 - 0.5) - 0.25)
    elif kind == "tiles":
        count = draws.integer(6, 12)
        parity = (np.floor(x * count) + np.floor(y * count)) % 2
        relief = draws.uniform(5, 9) * (2 * parity - 1)
    else:
        assert kind == "flat", f"no background {kind!r}"
    return relief.astype(np.float32)


@lru_cache(maxsize=8)
def _pixel_centers(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x as (1, size) and y as (size, 1), in [0, 1]."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return axis[None], axis[:, None]


def _smooth_field(cells: int, size: int, draws: Draws) -> NDArray[np.float32]:
    """Draw a field in [-1, 1] of so many soft blobs a side: (size, size) float32."""
    corners = draws.array(cells + 1, cells + 1)
    position = (np.arange(size) + 0.5) / size * cells
    lower = position.astype(np.int64)
    fraction = (position - lower).astype(np.float32)
    weight = fraction * fraction * (3 - 2 * fraction)
    rows = corners[lower] * (1 - weight)[:, None] + corners[lower + 1] * weight[:, None]
    field: NDArray[np.float32] = rows[:, lower] * (1 - weight) + rows[:, lower + 1] * weight
    return field
