"""Arbitrary arrays and damaged image files: an image or an error of our own, in bounded time."""

import contextlib
import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from coprs_deploy.errors import ImageError
from coprs_deploy.images import load_image
from tests.unit.image_samples import assert_is_rgb, colors, encoded, exif_block, frames

LIMIT_S = 20
"""CPU time of one image; the largest that a damaged header can announce takes about 2 s."""


SCENE, SMALL = Image.fromarray(colors(40, 60)), Image.fromarray(colors(9, 9))
DEEP = Image.fromarray(colors(9, 9, 0).astype(np.uint16) * 200)
CLEAR, INKS = (
    Image.new("RGBA", (30, 20), (9, 80, 200, 3)),
    Image.new("CMYK", (30, 20), (9, 80, 200, 3)),
)
ANIMATED = {"save_all": True, "append_images": frames("blue")}

FILES = {
    "PNG": encoded(SCENE, "PNG"),
    "PNG palette": encoded(SMALL.quantize(16), "PNG"),
    "PNG 16 bit": encoded(DEEP, "PNG"),
    "PNG animated": encoded(*frames("red"), "PNG", **ANIMATED),
    "JPEG": encoded(SCENE, "JPEG", exif=exif_block((274, 3, 1, b"\6\0\0\0"))),
    "JPEG progressive": encoded(SCENE, "JPEG", progressive=True),
    "JPEG CMYK": encoded(INKS, "JPEG"),
    "WebP": encoded(SCENE, "WEBP"),
    "WebP lossless": encoded(CLEAR, "WEBP", lossless=True),
    "BMP": encoded(SCENE, "BMP"),
    "TIFF": encoded(SCENE, "TIFF"),
    "TIFF LZW": encoded(SCENE, "TIFF", compression="tiff_lzw"),
    "TIFF deflate": encoded(SCENE, "TIFF", compression="tiff_adobe_deflate"),
    "GIF": encoded(SCENE, "GIF"),
    "GIF animated": encoded(*frames("red"), "GIF", **ANIMATED),
    "AVIF": encoded(SCENE, "AVIF"),
    "JPEG 2000": encoded(SCENE, "JPEG2000"),
    "ICO": encoded(CLEAR, "ICO"),
    "PPM": encoded(SCENE, "PPM"),
    "TGA": encoded(SCENE, "TGA"),
}


@st.composite
def damaged(draw, data):
    """Overwrite some bytes, remove or repeat a part, and cut the end off."""
    damage = bytearray(data)
    for position in draw(st.lists(st.integers(0, len(data) - 1), max_size=8)):
        damage[position] = draw(st.integers(0, 255))
    start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 64))
    part = bytes(damage[start : start + length])
    damage[start : start + length] = part * draw(st.sampled_from([1, 1, 0, 2, 9]))
    return bytes(damage[: draw(st.sampled_from([len(damage), draw(st.integers(0, len(damage)))]))])


@contextlib.contextmanager
def bounded():
    start = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
        yield
    assert time.thread_time() - start < LIMIT_S


@pytest.mark.parametrize("name", FILES)
@pytest.mark.fuzz
@given(draw=st.data())
def test_load_image_of_a_damaged_file_gives_an_image_or_an_image_error(name, draw):
    data = draw.draw(damaged(FILES[name]))
    with bounded():
        try:
            rgb = load_image(data)
        except ImageError as error:
            assert 10 < len(str(error)) < 1_000
        else:
            assert_is_rgb(rgb, *rgb.shape[:2])


@pytest.mark.parametrize("name", FILES)
def test_load_image_of_an_intact_file_gives_an_image(name):
    rgb = load_image(FILES[name])
    assert_is_rgb(rgb, *rgb.shape[:2])


@pytest.mark.fuzz
@given(st.binary(max_size=200))
def test_load_image_of_arbitrary_bytes_gives_an_image_or_an_image_error(data):
    with bounded(), contextlib.suppress(ImageError):
        assert_is_rgb(rgb := load_image(data), *rgb.shape[:2])


ANY_DTYPE = st.one_of(
    arrays.scalar_dtypes(),
    arrays.byte_string_dtypes(),
    st.sampled_from([np.dtype(kind) for kind in ("O", "u1", "u2", "f4")]),
)
ANY_SHAPE = st.one_of(
    arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 3, 4])),
)


@pytest.mark.fuzz
@given(draw=st.data())
def test_load_image_of_any_array_gives_an_image_of_its_size_or_a_value_error(draw):
    array = draw.draw(arrays.arrays(draw.draw(ANY_DTYPE), draw.draw(ANY_SHAPE)))
    form = draw.draw(st.sampled_from([np.array, np.flip, np.transpose, np.asfortranarray]))
    array = np.asarray(form(array))
    before = array.copy()
    try:
        rgb = load_image(array)
    except ValueError as error:
        assert 10 < len(str(error)) < 1_000
    else:
        assert_is_rgb(rgb, *array.shape[:2])
        assert not np.shares_memory(rgb, array)
    assert array.tobytes() == before.tobytes()  # also for objects that are unequal to themselves


@pytest.mark.fuzz
@given(
    arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3])),
        elements=st.floats(0, 1, width=16),
    )
)
def test_load_image_of_floats_in_range_rounds_to_the_nearest_level(array):
    levels = np.rint(array.astype(np.float64) * 255)
    rgb = load_image(array)
    assert np.abs(rgb.astype(float) - np.broadcast_to(levels, rgb.shape)).max() <= 1
