"""COCO segmentations: run-length encoding and polygons."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from coprs_deploy.data.rle import Rle, decode_mask, decode_segmentation, encode_mask

ignore_pycocotools = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)


@ignore_pycocotools
@pytest.mark.fuzz
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1))
def test_rle_agrees_with_pycocotools(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    encoded = encode_mask(mask)
    packed = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    assert encoded.counts == packed.decode()
    found = decode_mask(encoded, height, width)
    np.testing.assert_array_equal(found, mask)
    assert found.dtype == np.bool_
    expected = coco.decode({"size": [height, width], "counts": encoded.counts})
    np.testing.assert_array_equal(found, expected.astype(bool))


def run_lengths(mask):
    """Count the runs of a mask in column-major order, zeros first, as COCO's crowd annotations."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_form_of_rle_gives_the_same_mask(share):
    mask = np.random.default_rng(0).random((7, 9)) < share
    of_pycocotools = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert isinstance(of_pycocotools["counts"], bytes)
    text = {**of_pycocotools, "counts": of_pycocotools["counts"].decode()}
    runs = {"size": [7, 9], "counts": run_lengths(mask)}
    for form in (of_pycocotools, text, runs, {**runs, "size": (7, 9)}, encode_mask(mask)):
        np.testing.assert_array_equal(decode_mask(form, 7, 9), mask)


def test_uncompressed_rle_runs_down_the_columns():
    mask = decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    np.testing.assert_array_equal(mask, [[False, True, False], [True, False, False]])


def test_polygons_of_one_target_are_merged():
    square, triangle = [2, 3, 10, 3, 10, 9, 2, 9], [20.5, 2, 28, 17.25, 13, 17.25]
    mask = decode_mask([square, triangle], 20, 30)
    assert mask[3:9, 2:10].all() and mask[3:9, 2:10].sum() == 48
    drawn = Image.new("1", (30, 20))
    ImageDraw.Draw(drawn).polygon(triangle, fill=1)
    without_square = mask.copy()
    without_square[3:9, 2:10] = False
    difference = without_square != np.asarray(drawn)
    assert 100 < without_square.sum() < 130 and difference.sum() < 40  # border pixels only


def test_polygon_over_the_border_is_clipped():
    mask = decode_mask([[-4, -4, 6, -4, 6, 5, -4, 5]], 8, 8)
    assert mask[:5, :6].all() and mask.sum() == 30


SIZED = {"size": [3, 4]}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "it is null; accepted: RLE"),
        ("abc", "it is text; accepted"),
        ({}, r"an object with the keys \(none\)"),
        ({"segmentation": [], "area": 3}, "with the keys segmentation, area"),
        ({"size": [4, 3], "counts": [12]}, r"size is \[4, 3\], but the image is \[3, 4\]"),
        ({"size": [3.0, 4.0], "counts": [12]}, r"size is \[3.0, 4.0\]; accepted: \[height, width"),
        ({"size": 12, "counts": [12]}, "size is 12"),
        ({**SIZED, "counts": None}, "counts is null"),
        ({**SIZED, "counts": [5, 6]}, "add up to 11 pixels and the size to 12"),
        ({**SIZED, "counts": [13, -1]}, "the runs add up to 12"),
        ({**SIZED, "counts": [12, False]}, "counts has true or false in its list"),
        ({**SIZED, "counts": [2.0, 10.0]}, "counts has a number in its list; accepted: integers"),
        ({**SIZED, "counts": [12, None]}, "counts has null in its list"),
        ({**SIZED, "counts": "b'<'"}, r"repr of Python bytes; write counts.decode\(\)"),
        ({**SIZED, "counts": "\u00e9"}, "at an invalid position"),
        ({**SIZED, "counts": b"\xff"}, "at an invalid position"),
        ([], "an empty list"),
        ([1, 1, 3, 1, 3, 3], "polygon 1 is an integer"),
        ([[1, 1, 3, 1]], "polygon 1 has 4 numbers; accepted: x and y of at least three points"),
        ([[1, 1, 3, 1, 3]], "polygon 1 has 5 numbers"),
        ([[0, 0, 3, 0, 3, 3], [0, 0, 1e9, 0, 3, 3]], "polygon 2 has the x 1000000000.0"),
        ([[0, 0, 3, float("nan"), 3, 3]], "has the y nan in an image of 4 x 3 pixels"),
        ([[0, 0, 3, "1", 3, 3]], "has the y 1"),
        ([[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]], "cover no pixel; coordinates are pixels, not shares"),
    ],
)
def test_invalid_segmentation_is_refused_with_the_reason(segmentation, reason):
    with pytest.raises(ValueError, match=reason):
        decode_mask(segmentation, 3, 4)


@pytest.mark.fuzz
@given(st.text(max_size=12))
def test_decode_mask_of_any_counts_returns_the_size_or_is_refused(counts):
    with contextlib.suppress(ValueError):
        assert decode_mask(Rle((3, 4), counts), 3, 4).shape == (3, 4)


def inside(polygon, height, width):
    """Return which pixel centers lie in a polygon, and which lie within a pixel of its sides."""
    y, x = np.mgrid[:height, :width] + 0.5
    points = np.array(polygon).reshape(-1, 2)
    filled, near = np.zeros((height, width), bool), np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            filled ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        length = np.hypot(x1 - x0, y1 - y0)
        share = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length**2, 0, 1)
        near |= np.hypot(x - x0 - share * (x1 - x0), y - y0 - share * (y1 - y0)) < 1
    return filled, near


def star(random, height, width):
    """Return a polygon with its points around a center, some of them outside of the image."""
    angles = np.sort(random.uniform(0, 2 * np.pi, random.integers(3, 9)))
    radii = random.uniform(4, 24, len(angles))
    center = random.uniform((0, 0), (width, height))
    points = center + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    return points.ravel().tolist()


@pytest.mark.fuzz
@given(st.integers(0, 2**32))
def test_polygons_of_an_annotation_cover_the_pixel_centers_inside(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(20, 60, 2).tolist()
    polygons = [star(random, height, width) for _ in range(random.integers(1, 4))]
    found = decode_segmentation(polygons, height, width)
    parts = [inside(polygon, height, width) for polygon in polygons]
    certain = ~np.any([near for _, near in parts], axis=0)
    expected = np.any([filled for filled, _ in parts], axis=0)
    np.testing.assert_array_equal(found[certain], expected[certain])


def test_annotation_of_several_rle_is_merged_and_an_empty_list_is_empty():
    first, second = np.zeros((2, 5, 7), dtype=bool)
    first[:3, :3] = second[2:, 2:] = True
    parts = [encode_mask(first).to_json(), {"size": [5, 7], "counts": run_lengths(second)}]
    np.testing.assert_array_equal(decode_segmentation(parts, 5, 7), first | second)
    assert not decode_segmentation([], 5, 7).any()
    np.testing.assert_array_equal(decode_segmentation(parts[0], 5, 7), first)


def test_annotation_with_a_polygon_of_two_points_keeps_its_other_polygons():
    square = [1, 1, 4, 1, 4, 4, 1, 4]
    expected = np.zeros((6, 6), dtype=bool)
    expected[1:4, 1:4] = True
    found = decode_segmentation([[0, 0, 5, 5], square], 6, 6)
    np.testing.assert_array_equal(found, expected)
    assert not decode_segmentation([[0, 0, 5, 5]], 6, 6).any()
