"""Rendering of a layout: background, textured objects, and sensor noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.data.synthetic.layout import (
    SAMPLES_PER_SIDE,
    Footprint,
    Layout,
    ObjectSpec,
    sum_samples,
)
from coprs_deploy.data.synthetic.presets import Preset
from coprs_deploy.data.synthetic.rng import PortableRng
from coprs_deploy.images import RgbArray

DARK_SHARE = 0.56
"""Relative darkening of the dark parts of a texture."""

COLOR_SHIFT = 12.0
"""Maximum shift of an object's color per channel."""

LIGHTNESS_NOISE = 4.0
COLOR_NOISE = 2.5
"""Standard deviations in 0..255 of the noise over the whole image."""

BACKGROUND_LIGHTNESS = (26.0, 112.0)
BACKGROUND_TINT = 20.0
"""Backgrounds are dim and greyish, unlike any object."""


def render(layout: Layout, preset: Preset, rng: PortableRng) -> RgbArray:
    """Render a layout, (H, W, 3) uint8 RGB."""
    size = preset.image_size
    background = rng.choice(preset.backgrounds)
    base = rng.uniform(*BACKGROUND_LIGHTNESS) + BACKGROUND_TINT * rng.array(3)
    tint = 1 + 0.35 * rng.array(3)
    canvas: NDArray[np.float32] = base + _pattern(background, size, rng)[..., None] * tint
    for spec, footprint in zip(layout.specs, layout.footprints, strict=True):
        window = canvas[footprint.rows, footprint.columns]
        coverage = footprint.coverage.astype(np.float32) / SAMPLES_PER_SIDE**2
        window += coverage[..., None] * (_render_object(spec, footprint, preset, rng) - window)
    canvas += LIGHTNESS_NOISE * rng.noise(size, size, 1)
    canvas += COLOR_NOISE * rng.noise(size, size, 3)
    np.clip(canvas, 0, 255, out=canvas)
    return canvas.astype(np.uint8)


def _render_object(
    spec: ObjectSpec, footprint: Footprint, preset: Preset, rng: PortableRng
) -> NDArray[np.float32]:
    """Color the whole window of an object: (h, w, 3) float32 in 0..255."""
    base = np.array(vocabulary.COLORS[spec.color], dtype=np.float32)
    color = base + COLOR_SHIFT * rng.array(3)
    middle = SAMPLES_PER_SIDE // 2
    x, y = footprint.x[:, middle::SAMPLES_PER_SIDE], footprint.y[middle::SAMPLES_PER_SIDE]
    light_x, light_y = rng.direction()
    light = 1 + preset.shading * ((x * light_x + y * light_y) / spec.radius).astype(np.float32)
    dark = _dark_samples(spec.texture, footprint, preset.texture_period * preset.image_size, rng)
    if dark is not None:
        samples = sum_samples((dark & footprint.inside).view(np.uint8))
        share = samples / np.maximum(footprint.coverage, 1).astype(np.float32)
        light = light * (1 - DARK_SHARE * share)
    rendered: NDArray[np.float32] = light[..., None] * color
    return rendered


def _dark_samples(
    texture: str, footprint: Footprint, period: float, rng: PortableRng
) -> NDArray[np.bool_] | None:
    """Return the samples that a texture darkens, (3h, 3w) bool; None for a plain one."""
    period *= rng.uniform(0.9, 1.15)
    x, y = (
        axis / np.float32(period) + np.float32(rng.uniform(0, 1))
        for axis in (footprint.x, footprint.y)
    )
    dark: NDArray[np.bool_] | None = None
    if texture == "striped":
        step_x, step_y = rng.choice(((1.0, 0.0), (0.0, 1.0), (0.707, 0.707), (0.707, -0.707)))
        along = x * np.float32(step_x) + y * np.float32(step_y)
        dark = along - np.floor(along) < np.float32(0.5)
    elif texture == "checkered":
        # Squares of 0.8 periods, so that a small object shows several.
        dark = (np.floor(x / np.float32(0.8)) + np.floor(y / np.float32(0.8))) % 2 < 1
    elif texture == "dotted":
        from_dot_x, from_dot_y = x - np.floor(x) - 0.5, y - np.floor(y) - 0.5
        dark = from_dot_x**2 + from_dot_y**2 < np.float32(0.1)
    else:
        assert texture == "plain", f"no texture {texture!r}"
    return dark


def _pattern(background: str, size: int, rng: PortableRng) -> NDArray[np.float32]:
    """Return the brightness pattern of a background, (size, size) float32 around 0."""
    x, y = _pixel_centers(size)
    pattern: NDArray[np.floating] = np.zeros((size, size), dtype=np.float32)
    if background == "gradient":
        step_x, step_y = rng.direction()
        pattern = rng.uniform(20, 45) * ((x - 0.5) * step_x + (y - 0.5) * step_y)
    elif background == "grain":
        coarse = rng.noise(size // 2, size // 2).repeat(2, axis=0).repeat(2, axis=1)
        pattern = rng.uniform(5, 9) * coarse
    elif background == "blobs":
        pattern = rng.uniform(16, 24) * _smooth_field(6, size, rng)
    elif background == "clouds":
        pattern = 20 * _smooth_field(4, size, rng) + 12 * _smooth_field(16, size, rng)
    elif background == "stripes":
        step_x, step_y = rng.direction()
        along = (x * step_x + y * step_y) * rng.uniform(5, 11) + 4
        pattern = rng.uniform(28, 48) * (np.abs(along % 1 - 0.5) - 0.25)
    elif background == "tiles":
        count = rng.integer(6, 12)
        parity = (np.floor(x * count) + np.floor(y * count)) % 2
        pattern = rng.uniform(5, 9) * (2 * parity - 1)
    else:
        assert background == "flat", f"no background {background!r}"
    return pattern.astype(np.float32)


@lru_cache(maxsize=8)
def _pixel_centers(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x as (1, size) and y as (size, 1), in [0, 1]."""
    axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return axis[None], axis[:, None]


def _smooth_field(cells: int, size: int, rng: PortableRng) -> NDArray[np.float32]:
    """Draw a smooth random field in [-1, 1] of cells x cells: (size, size) float32."""
    corners = rng.array(cells + 1, cells + 1)
    position = (np.arange(size) + 0.5) / size * cells
    lower = position.astype(np.int64)
    fraction = (position - lower).astype(np.float32)
    weight = fraction * fraction * (3 - 2 * fraction)
    rows = corners[lower] * (1 - weight)[:, None] + corners[lower + 1] * weight[:, None]
    field: NDArray[np.float32] = rows[:, lower] * (1 - weight) + rows[:, lower + 1] * weight
    return field
