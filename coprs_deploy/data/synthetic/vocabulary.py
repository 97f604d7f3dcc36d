"""Terms of synthetic scenes: shapes, textures, sizes, colors, backgrounds."""

from __future__ import annotations

GRID_SIZE = 8
"""Rows and columns of the grid of locations; row1 col1 is the top left cell."""

PLAIN_SHAPES = ("circle", "square", "triangle", "star", "cross")
FULL_SHAPES = (*PLAIN_SHAPES, "diamond", "hexagon", "ring", "heart", "crescent")

PLAIN_TEXTURES = ("plain", "striped")
FULL_TEXTURES = (*PLAIN_TEXTURES, "dotted", "checkered")

SIZES = ("small", "medium", "large")
"""Ascending."""

COLORS = {
    "red": (222, 44, 40),
    "orange": (250, 138, 22),
    "yellow": (250, 222, 48),
    "green": (46, 170, 70),
    "cyan": (48, 210, 222),
    "blue": (48, 92, 232),
    "purple": (150, 66, 206),
    "white": (242, 242, 242),
}
"""RGB in 0..255, before a small random shift per object."""

PLAIN_BACKGROUNDS = ("flat", "gradient", "grain", "blobs")
FULL_BACKGROUNDS = (*PLAIN_BACKGROUNDS, "clouds", "stripes", "tiles")

# fmt: off
THINGS = (
    "cat", "dog", "horse", "bird", "fish", "car", "bus", "train", "boat", "bicycle", "tree",
    "flower", "apple", "banana", "house", "door", "window", "chair", "table", "lamp", "book",
    "phone", "clock", "cup", "bottle", "spoon", "shoe", "hat", "man", "woman", "child", "face",
    "hand", "cloud", "mountain", "river", "road", "bridge", "ball", "key", "letter", "number",
    "arrow", "pentagon", "cube",
)
# fmt: on
"""Nouns of objects that no scene has, for no-match instructions."""
