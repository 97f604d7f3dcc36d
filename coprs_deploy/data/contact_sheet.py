"""Contact sheets: examples with their targets outlined, and their texts, on one page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from coprs_deploy.data.examples import Example
from coprs_deploy.visualization import WHITE, TextLine, draw_text, outline_band, wrap_text

TILE_PX = 320
MARGIN_PX = 14
OUTLINE_PX = 3

PAPER = (250, 250, 248)
INK = (24, 24, 27)
FAINT_INK = (96, 96, 104)
OUTLINE = (255, 0, 200)
"""RGB; a color that no object has, drawn between the mask and a white line."""

IGNORED_OUTLINE = INK
"""RGB; outline of the ignore mask, on a white line as those of targets."""

LABEL_FONT_PX, INSTRUCTION_FONT_PX, RESPONSE_FONT_PX = 12, 17, 13


def draw_contact_sheet(examples: Sequence[Example], columns: int = 6) -> Image.Image:
    """Draw examples in a grid: the image with its targets outlined, instruction and response below.

    Args:
        examples: at least one; several targets of one example are numbered.
        columns: number of columns.

    Raises:
        ValueError: there are no examples, or columns is below 1.
    """
    if not examples or columns < 1:
        raise ValueError(
            f"there are {len(examples)} examples and {columns} columns; both must be at least 1"
        )
    columns = min(columns, len(examples))
    captions = [_caption(example) for example in examples]
    heights = [
        TILE_PX + 2 * MARGIN_PX + max(sum(line.height for line in lines) for lines in row)
        for row in (captions[i : i + columns] for i in range(0, len(captions), columns))
    ]
    width = columns * (TILE_PX + MARGIN_PX) + MARGIN_PX
    page = Image.new("RGB", (width, sum(heights) + MARGIN_PX), PAPER)
    for number, (example, lines) in enumerate(zip(examples, captions, strict=True)):
        row, column = divmod(number, columns)
        left = MARGIN_PX + column * (TILE_PX + MARGIN_PX)
        top = MARGIN_PX + sum(heights[:row])
        page.paste(draw_targets(example), (left, top))
        draw_text(page, lines, left, top + TILE_PX + MARGIN_PX // 2)
    return page


def draw_targets(example: Example) -> Image.Image:
    """Resize an image to a long side of ``TILE_PX``; outline its targets and its ignore mask."""
    height, width = example.image.shape[:2]
    factor = TILE_PX / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = Image.fromarray(example.image).resize(size, Image.Resampling.BICUBIC)
    canvas = np.array(image)
    if example.ignore_mask is not None:
        canvas[outline_band(example.ignore_mask, size, OUTLINE_PX + 2)] = WHITE
        canvas[outline_band(example.ignore_mask, size, OUTLINE_PX)] = IGNORED_OUTLINE
    for mask in example.masks:
        canvas[outline_band(mask, size, OUTLINE_PX + 2)] = WHITE
        canvas[outline_band(mask, size, OUTLINE_PX)] = OUTLINE
    drawn = Image.fromarray(canvas)
    if len(example.masks) > 1:
        for number, mask in enumerate(example.masks, start=1):
            _number(drawn, mask, number, factor)
    return drawn


def _number(drawn: Image.Image, mask: NDArray[np.bool_], number: int, factor: float) -> None:
    rows, columns = np.nonzero(mask)
    # The pixel of the mask nearest to its center, which may lie outside the mask, as for a ring.
    center = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
    position = (float(columns[center] * factor), float(rows[center] * factor))
    font = ImageFont.load_default(INSTRUCTION_FONT_PX)
    ImageDraw.Draw(drawn).text(
        position, str(number), font=font, fill=WHITE, anchor="mm", stroke_width=3, stroke_fill=INK
    )


def _caption(example: Example) -> list[TextLine]:
    label = TextLine(f"{example.question_type}  {example.id}", LABEL_FONT_PX, FAINT_INK)
    instruction = _wrap(example.instruction, INSTRUCTION_FONT_PX, INK)
    return [label, *instruction, *_wrap(example.response, RESPONSE_FONT_PX, FAINT_INK)]


def _wrap(text: str, font_px: int, color: tuple[int, int, int]) -> list[TextLine]:
    return [TextLine(line, font_px, color) for line in wrap_text(text, font_px, TILE_PX)]
