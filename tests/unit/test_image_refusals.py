"""Refused image sources and their error messages."""

import io
import re
import struct
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from coprs_deploy import images
from coprs_deploy.errors import ImageDecodeError, ImageError, ImageSizeError
from coprs_deploy.images import load_image
from tests.unit.image_samples import (
    GREEN,
    PROPERTY,
    RED,
    assert_is_rgb,
    colors,
    encoded,
    frames,
    png,
)


def test_load_image_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")


def test_load_image_directory_is_refused(tmp_path):
    with pytest.raises(
        ImageDecodeError, match=re.escape(f"{str(tmp_path)!r} cannot be opened: Is a dir")
    ):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/a.png",
        "file:///a.png",
        "data:image/png;base64," + "A" * 2_000_000,
        Path("http://example.org/a.png"),
    ],
)
def test_load_image_url_is_not_fetched_and_the_message_is_short(source):
    with pytest.raises(ImageDecodeError, match="is a URL; URLs are not fetched") as error:
        load_image(source)
    assert len(str(error.value)) < 400
    assert str(source)[:20] in str(error.value)


def test_load_image_path_that_cannot_be_opened_is_named_once_and_shortened(tmp_path):
    with pytest.raises(ImageDecodeError, match="cannot be opened: File name too long") as error:
        load_image(tmp_path / ("x" * 3_000))
    assert len(str(error.value)) < 400
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageDecodeError, match=r"a\.png/b' cannot be opened: Not a directory"):
        load_image(tmp_path / "a.png" / "b")


HEIC_START = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"


def test_load_image_heic_names_the_library_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(HEIC_START)
    for source in (HEIC_START, tmp_path / "a.heic"):
        with pytest.raises(ImageDecodeError, match=r"is HEIC, .* pip install pillow-heif"):
            load_image(source)


def test_load_image_heic_is_read_when_the_library_is_installed(monkeypatch):
    class HeifImage(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (5, 3), "RGB"

        def load(self):
            self.im = Image.new(self.mode, self.size).im

    def register():
        Image.register_open("HEIF", HeifImage, lambda start: start[4:12] == b"ftypheic")

    for registry in ("OPEN", "ID"):
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())
    library = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", library)
    assert_is_rgb(load_image(HEIC_START), 3, 5)


def test_load_image_empty_bytes_are_refused():
    with pytest.raises(ImageDecodeError, match="0 bytes"):
        load_image(b"")


def test_load_image_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageDecodeError, match=r"empty\.png"):
        load_image(tmp_path / "empty.png")


def test_load_image_text_file_is_refused_with_the_accepted_formats(tmp_path):
    (tmp_path / "notes.png").write_text("not an image at all")
    with pytest.raises(ImageDecodeError, match=r"notes\.png' is not an image.*PNG, JPEG"):
        load_image(tmp_path / "notes.png")
    with pytest.raises(ImageDecodeError, match=r"19 bytes is not an image.*PNG, JPEG"):
        load_image((tmp_path / "notes.png").read_bytes())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.4, 0.8])
def test_load_image_truncated_file_is_refused(tmp_path, form, kept):
    data = encoded(Image.fromarray(colors(40, 60)), form)
    file = tmp_path / "half"
    file.write_bytes(data[: int(kept * len(data))])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # Pillow's, about a lost TIFF tag
        with pytest.raises(
            ImageDecodeError, match=r"half' (cannot be decoded .*cut short|is not an)"
        ):
            load_image(file)


def test_load_image_animation_truncated_in_its_first_frame_is_refused():
    first, *rest = (Image.fromarray(colors(40, 60, seed=seed)) for seed in range(2))
    data = encoded(first, "GIF", save_all=True, append_images=rest)
    with pytest.raises(ImageDecodeError, match="cut short"):
        load_image(data[: len(data) // 4])


def test_load_image_animation_truncated_after_its_first_frame_gives_that_frame():
    first, *rest = (Image.fromarray(colors(40, 60, seed=seed)) for seed in range(2))
    data = encoded(first, "GIF", save_all=True, append_images=rest)
    np.testing.assert_array_equal(load_image(data[: int(0.8 * len(data))]), load_image(data))


@pytest.mark.parametrize(
    ("width", "height"), [(9_460, 9_459), (20_000, 20_000), (2**31 - 1, 2**31 - 1)]
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_load_image_decompression_bomb_is_refused_by_its_header(monkeypatch, width, height, action):
    def refuse(_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ImageSizeError, match="limit is 89,478,485: scale it down first"):
            load_image(png(width, height, 8, 2, []))


def test_load_image_limit_holds_without_the_limit_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageSizeError, match=r"20000 x 20000, 400,000,000 pixels; .*scale it down"):
        load_image(png(20_000, 20_000, 8, 2, []))


def test_load_image_accepts_exactly_the_limit(monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 20)
    assert_is_rgb(load_image(colors(4, 5)), 4, 5)
    assert_is_rgb(load_image(Image.new("RGB", (5, 4))), 4, 5)
    for source in (colors(3, 7), Image.new("RGB", (7, 3))):
        with pytest.raises(ImageSizeError, match=r"7 x 3, 21 pixels; the limit is 20"):
            load_image(source)


def test_load_image_huge_array_is_refused_before_it_is_copied():
    with pytest.raises(ImageSizeError, match="limit is 89,478,485"):
        load_image(np.broadcast_to(np.float64(0.5), (10**6, 10**6, 3)))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 5, 3), (5, 0, 4)])
def test_load_image_array_without_pixels_is_refused(shape):
    with pytest.raises(
        ImageSizeError, match=f"{shape[1]} x {shape[0]}; it needs at least one pixel"
    ):
        load_image(np.zeros(shape, dtype=np.uint8))


def test_load_image_pillow_image_without_pixels_is_refused():
    with pytest.raises(ImageSizeError, match="0 x 3; it needs at least one pixel"):
        load_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize(
    "shape", [(), (5,), (2, 2, 2), (2, 2, 5), (5, 5, 0), (3, 40, 60), (1, 4, 4, 3)]
)
def test_load_image_array_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}; accepted: (H, W)")):
        load_image(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint32", "complex64", "object", "U1"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3)])
def test_load_image_array_of_another_dtype_is_refused(dtype, shape):
    array = np.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=rf"dtype {array.dtype}; accepted: uint8, uint16, bool"):
        load_image(array)


@pytest.mark.parametrize("value", [1.001, 255.0, -0.001, np.inf, -np.inf])
def test_load_image_floats_out_of_range_are_refused(value):
    array = np.full((2, 3, 3), 0.5)
    array[1, 2, 0] = value
    low, high = array.min(), array.max()
    with pytest.raises(ValueError, match=re.escape(f"floats from {low:g} to {high:g}; accepted")):
        load_image(array)


def test_load_image_array_with_nan_is_refused():
    array = np.full((2, 3), 0.5, dtype=np.float32)
    array[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"accepted: \[0, 1\]"):
        load_image(array)


@pytest.mark.parametrize("source", [None, 7, 1.5, ["scene.png"], memoryview(b"x")])
def test_load_image_another_type_is_refused_by_name(source):
    with pytest.raises(ValueError, match=f"{type(source).__name__}; accepted: a path, bytes"):
        load_image(source)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (2, 2), 0.5), "floats of unknown range; pass an array in"),
        (Image.new("I", (2, 2), -1), r"outside 0\.\.65535"),
        (Image.new("I", (2, 2), 65_536), r"outside 0\.\.65535"),
    ],
)
def test_load_image_pillow_pixels_of_unknown_range_are_refused(image, reason):
    with pytest.raises(ImageDecodeError, match=reason):
        load_image(image)


def test_load_image_refused_pixel_range_is_not_reported_as_truncated():
    with pytest.raises(ImageDecodeError) as refusal:
        load_image(Image.new("F", (2, 2), 0.5))
    assert "cut short" not in str(refusal.value)


def test_load_image_closed_image_is_refused():
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (2, 2)), "PNG")))
    image.close()
    with pytest.raises(ImageDecodeError, match="closed"):
        load_image(image)


def test_load_image_damaged_header_is_refused():
    data = encoded(Image.new("RGB", (4, 4)), "DDS")
    flags = struct.pack("<II", 32, 0x40)  # size of the pixel format, then "uncompressed RGB"
    assert data.count(flags) == 1
    with pytest.raises(ImageDecodeError, match="bytes cannot be decoded"):
        load_image(data.replace(flags, struct.pack("<II", 32, 0)))


def test_load_image_damaged_second_page_is_ignored():
    first, *rest = frames(RED, GREEN)
    data = encoded(first, "TIFF", save_all=True, append_images=rest)
    head, tail = data[:150], data[150:]
    width_entry = struct.pack("<HHII", 0x0100, 4, 1, 4)
    assert width_entry in tail
    tail = tail.replace(width_entry, struct.pack("<HHII", 0x00F0, 4, 1, 4), 1)
    np.testing.assert_array_equal(load_image(head + tail)[0, 0], RED)


@PROPERTY
@given(
    form=st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    kept=st.floats(0, 1),
)
def test_load_image_damaged_bytes_give_an_image_or_an_image_error(form, changes, kept):
    data = bytearray(encoded(Image.fromarray(colors(6, 7)), form))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        rgb = load_image(data[: round(kept * len(data))])
    except ImageError as error:
        assert len(str(error)) > 20
    else:
        assert_is_rgb(rgb, *rgb.shape[:2])
