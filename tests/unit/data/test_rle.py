"""Run-length encoding of masks."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from coprs_deploy.data.rle import Rle, decode_mask, encode_mask


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1))
def test_rle_agrees_with_pycocotools(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    encoded = encode_mask(mask)
    found = decode_mask(encoded)
    np.testing.assert_array_equal(found, mask)
    assert found.dtype == np.bool_
    expected = coco.decode({"size": [height, width], "counts": encoded.counts})
    np.testing.assert_array_equal(found, expected.astype(bool))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(max_size=12))
def test_decode_mask_of_any_counts_returns_the_size_or_is_refused(counts):
    with contextlib.suppress(ValueError):
        assert decode_mask(Rle((3, 4), counts)).shape == (3, 4)


def test_decode_mask_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0 x 4"):
        decode_mask(Rle((0, 4), ""))
