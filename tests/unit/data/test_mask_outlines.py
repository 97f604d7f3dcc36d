"""Polygons of masks, filled by pycocotools."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from coprs_deploy.data.mask_outlines import polygons_from_mask
from coprs_deploy.data.rle import decode_mask


def filled(polygons, shape):
    return decode_mask(polygons, *shape) if polygons else np.zeros(shape, np.bool_)


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_polygons_of_any_mask_are_filled_to_the_mask(mask):
    assert np.array_equal(filled(polygons_from_mask(mask), mask.shape), mask)


@given(st.integers(0, 2**32 - 1))
def test_polygons_of_smooth_masks_are_filled_to_the_mask(seed):
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:90, :120]
    waves = sum(
        np.sin(generator.uniform(0, 0.3) * x + generator.uniform(0, 0.3) * y + offset)
        for offset in generator.uniform(0, 6, 4)
    )
    mask = waves > 0.5
    assert np.array_equal(filled(polygons_from_mask(mask), mask.shape), mask)


def test_polygon_of_a_rectangle_has_its_corners():
    mask = np.zeros((10, 20), np.bool_)
    mask[2:5, 3:9] = True
    assert polygons_from_mask(mask) == [[3, 2, 9, 2, 9, 5, 3, 5]]


def test_polygons_of_an_empty_mask_are_none():
    assert polygons_from_mask(np.zeros((3, 4), np.bool_)) == []


@pytest.mark.parametrize("corner", [(0, 0), (7, 7)])
def test_ring_is_cut_into_parts_without_a_hole(corner):
    mask = np.zeros((30, 30), np.bool_)
    mask[5:20, 6:25] = True
    mask[8:15, 10:20] = False
    mask[corner] = True
    polygons = polygons_from_mask(mask)
    assert np.array_equal(filled(polygons, mask.shape), mask)
    assert all(isinstance(value, int) for polygon in polygons for value in polygon)
