"""Resizing of logits to the original image size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from coprs_deploy.images import ResizeTransform, unpadded_size
from coprs_deploy.logits import resize_logits, sigmoid
from tests.unit.image_samples import PROPERTY, SAM, TINY


def logits_of(count, size, seed=0):
    return (5 * np.random.default_rng(seed).standard_normal((count, 1, size, size))).astype(
        np.float32
    )


def prepared_of(height, width, geometry):
    inside = unpadded_size(height, width, geometry.image_size)
    return ResizeTransform(np.array(inside), (height, width))


def three_interpolations(logits, prepared, geometry):
    side = (geometry.image_size, geometry.image_size)
    height, width = prepared.unpadded_size.tolist()
    exact = torch.from_numpy(logits).double()  # in float32 torch's positions are off by 1e-5 cells
    padded = F.interpolate(exact, side, mode="bilinear", align_corners=False)
    inside = padded[..., :height, :width]
    original = F.interpolate(
        inside, prepared.original_size, mode="bilinear", align_corners=False, antialias=False
    )
    return original[:, 0].numpy()


@pytest.mark.parametrize(
    ("height", "width", "geometry"),
    [
        (128, 128, TINY),
        (17, 31, TINY),
        (31, 17, TINY),
        (300, 200, TINY),
        (97, 511, TINY),
        (1, 1, TINY),
        (1, 700, TINY),
        (700, 1, TINY),
        (2, 129, TINY),
        (1024, 1024, SAM),
        (480, 640, SAM),
        (1300, 900, SAM),
        (1, 3000, SAM),
        (3000, 2, SAM),
        (5, 2048, SAM),
    ],
)
def test_resize_logits_equals_three_interpolations(height, width, geometry):
    logits = logits_of(2, geometry.mask_size)
    prepared = prepared_of(height, width, geometry)
    resized = resize_logits(logits, prepared, geometry)
    assert resized.shape == (2, height, width)
    assert resized.dtype == np.float32
    reference = three_interpolations(logits, prepared, geometry)
    # Logits reach 20 here, so that 1e-5 is a few roundings of float32.
    np.testing.assert_allclose(resized, reference, rtol=0, atol=1e-5)
    assert abs((resized - reference).mean(dtype=np.float64)) < 1e-6


@settings(PROPERTY, max_examples=30)
@given(height=st.integers(1, 200), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_resize_logits_stays_within_the_range_of_its_input(height, width, seed):
    logits = logits_of(1, TINY.mask_size, seed)
    prepared = prepared_of(height, width, TINY)
    resized = resize_logits(logits, prepared, TINY)
    assert resized.min() >= logits.min() - 1e-4
    assert resized.max() <= logits.max() + 1e-4
    constant = resize_logits(np.full_like(logits, -3.25), prepared, TINY)
    np.testing.assert_allclose(constant, -3.25, atol=1e-5)


def test_resize_logits_ignores_cells_in_the_padding():
    prepared = prepared_of(64, 128, TINY)  # the image ends at cell 32 of 64
    logits = logits_of(1, 64)
    changed = logits.copy()
    changed[:, :, 33:] = 1000  # one cell further still reaches the last row of pixels
    np.testing.assert_array_equal(
        resize_logits(logits, prepared, TINY), resize_logits(changed, prepared, TINY)
    )


def test_resize_logits_without_targets_is_empty():
    empty = np.zeros((0, 1, 64, 64), dtype=np.float32)
    assert resize_logits(empty, prepared_of(20, 30, TINY), TINY).shape == (0, 20, 30)


def test_sigmoid_of_extreme_logits_does_not_overflow():
    logits = np.array([-1e30, -50, 0, np.log(3), 50, 1e30], dtype=np.float32)
    with np.errstate(all="raise"):
        probabilities = sigmoid(logits)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, [0, 0, 0.5, 0.75, 1, 1], rtol=1e-6)
