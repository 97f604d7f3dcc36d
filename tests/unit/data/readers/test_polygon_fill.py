"""Polygons as OpenCV fills them: recorded masks, and OpenCV itself where it is installed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coprs_deploy.data.readers.polygon_fill import fill_polygon
from tests.unit.data.readers import record_polygons


def test_polygons_equal_the_masks_that_opencv_drew():
    recorded = list(record_polygons.read())
    assert len(recorded) == record_polygons.NUM_POLYGONS
    for points, mask in recorded:
        np.testing.assert_array_equal(fill_polygon(points, *mask.shape), mask, str(points))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(2, 1)], ["....", "..#.", "...."]),
        ([(0, 0), (3, 0)], ["####", "....", "...."]),
        ([(1, 0), (2, 0), (2, 2), (1, 2)], [".##.", ".##.", ".##."]),
        ([(0, 0), (2, 0), (0, 2)], ["###.", "##..", "#..."]),
        ([(-5, -5), (20, -5), (20, 20), (-5, 20)], ["####", "####", "####"]),
        ([(5, 5), (9, 5), (9, 9)], ["....", "....", "...."]),
        ([(1.9, 0.9), (-0.9, 2.9)], [".#..", "#...", "#..."]),
    ],
)
def test_small_polygons_cover_these_pixels(points, expected):
    found = fill_polygon(points, 3, 4)
    assert ["".join(".#"[pixel] for pixel in row) for row in found.astype(int)] == expected


coordinate = st.one_of(st.floats(-8, 70, width=32), st.integers(-5000, 5000))


@pytest.mark.fuzz
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=12),
)
def test_polygons_equal_those_of_the_installed_opencv(height, width, points):
    opencv = pytest.importorskip("cv2", reason="compares with OpenCV, which is not installed")
    drawn = np.zeros((height, width), np.uint8)
    whole = np.array([points]).astype(np.int32)
    opencv.polylines(drawn, whole, True, 1, 1)
    opencv.fillPoly(drawn, whole, 1)
    np.testing.assert_array_equal(fill_polygon(points, height, width), drawn.astype(bool))
