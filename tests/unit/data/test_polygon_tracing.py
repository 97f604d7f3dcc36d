"""Polygons of masks: what they cover when they are filled is the mask, to the pixel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coprs_deploy.data.polygon_tracing import trace_mask
from coprs_deploy.data.readers.polygon_fill import fill_polygon
from coprs_deploy.data.synthetic import FULL, make_scene


def covered(polygons, shape):
    mask = np.zeros(shape, dtype=bool)
    for polygon in polygons:
        mask |= fill_polygon(polygon, *shape)
    return mask


def mask_of(*rows):
    return np.array([[pixel == "#" for pixel in row] for row in rows])


@given(arrays(np.bool_, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_trace_mask_of_any_mask_covers_exactly_its_pixels(mask):
    np.testing.assert_array_equal(covered(trace_mask(mask), mask.shape), mask)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_trace_mask_of_blocks_covers_exactly_its_pixels(seed, size):
    coarse = np.random.default_rng(seed).random((6, 7)) < 0.6
    mask = coarse.repeat(size, axis=0).repeat(size, axis=1)
    np.testing.assert_array_equal(covered(trace_mask(mask), mask.shape), mask)


@pytest.mark.parametrize("seed", range(4))
def test_trace_mask_of_a_scene_covers_exactly_each_object(seed):
    scene = make_scene(FULL, seed)
    for number in range(len(scene.objects)):
        (mask,) = scene.masks([number])
        np.testing.assert_array_equal(covered(trace_mask(mask), mask.shape), mask)


def test_trace_mask_keeps_only_the_corners():
    assert trace_mask(mask_of(".....", ".###.", ".###.", ".....")) == [
        [(1, 1), (3, 1), (3, 2), (1, 2)]
    ]


def test_trace_mask_without_a_hole_is_one_polygon_a_region():
    mask = mask_of("##...#", "##..#.", "......", "#.....")
    assert len(trace_mask(mask)) == 3
    assert trace_mask(mask)[2] == [(0, 3)]


def test_trace_mask_with_a_hole_is_cut_into_few_parts():
    mask = mask_of("#####", "#...#", "#.#.#", "#...#", "#####")
    assert len(trace_mask(mask)) == 3
    np.testing.assert_array_equal(covered(trace_mask(mask), mask.shape), mask)


def test_trace_mask_of_an_empty_mask_is_no_polygon():
    assert trace_mask(np.zeros((3, 4), dtype=bool)) == []


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(4))
def test_trace_mask_drawn_by_opencv_is_the_mask(seed):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    scene = make_scene(FULL, seed)
    for number in range(len(scene.objects)):
        (mask,) = scene.masks([number])
        drawn = np.zeros(mask.shape, dtype=np.uint8)
        for polygon in trace_mask(mask):
            points = np.array([polygon], dtype=np.int32)
            cv2.polylines(drawn, points, True, 1, 1)
            cv2.fillPoly(drawn, points, 1)
        np.testing.assert_array_equal(drawn.astype(bool), mask)
