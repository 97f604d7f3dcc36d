"""Contact sheets of examples."""

import numpy as np
import pytest

from coprs_deploy.data.contact_sheet import OUTLINE, TILE_PX, draw_contact_sheet, draw_targets
from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic import FULL, SceneExamples


def test_contact_sheet_outlines_the_targets():
    examples = SceneExamples(FULL, 12)
    for example in examples:
        drawn = np.asarray(draw_targets(example))
        assert drawn.shape == (TILE_PX, TILE_PX, 3)
        assert (drawn == OUTLINE).all(axis=2).any() == bool(len(example.masks))
    sheet = draw_contact_sheet(examples[:5], columns=3)
    assert sheet.width > 3 * TILE_PX and sheet.height > 2 * TILE_PX
    with pytest.raises(ValueError, match="0 examples"):
        draw_contact_sheet([])
    with pytest.raises(ValueError, match="0 columns"):
        draw_contact_sheet(examples[:1], columns=0)


def test_contact_sheet_of_an_image_of_a_few_pixels_in_height():
    thin = Example("thin", np.zeros((2, 2000, 3), np.uint8), "it", np.ones((1, 2, 2000), np.bool_))
    assert draw_targets(thin).size == (TILE_PX, 1)
    assert draw_contact_sheet([thin]).width > TILE_PX
