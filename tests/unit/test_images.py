import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from coprs_deploy import images
from coprs_deploy.errors import ImageDecodeError, ImageError, ImageSizeError
from coprs_deploy.images import (
    PreparedImage,
    fit_pixel_count,
    image_key,
    load_image,
    prepare_image,
    resize_logits,
    unpadded_size,
)
from coprs_deploy.specs import Geometry

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
SAM = Geometry()
TINY = Geometry(image_size=128, patch_size=8, embedding_channels=64)

RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
)


def colors(height=3, width=5, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width, height, depth, color_type, rows, *chunks):
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*extra) for extra in chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def exif_block(*entries):
    body = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack("<HHI4s", tag, kind, count, value)
    return b"Exif\0\0" + body + bytes(4)


def frames(*fills):
    return [Image.new("RGB", (4, 3), fill) for fill in fills]


def assert_is_rgb(rgb, height, width):
    assert rgb.dtype == np.uint8
    assert rgb.shape == (height, width, 3)
    assert rgb.flags.c_contiguous


# Every source and every kind of picture


@pytest.mark.parametrize("as_source", [str, Path, Path.read_bytes, Image.open, np.asarray])
def test_every_source_gives_the_same_pixels(tmp_path, as_source):
    pixels = colors()
    file = tmp_path / "scene.png"
    Image.fromarray(pixels).save(file)
    if as_source is Image.open:
        with Image.open(file) as image:
            rgb = load_image(image)
    else:
        rgb = load_image(pixels if as_source is np.asarray else as_source(file))
    assert_is_rgb(rgb, 3, 5)
    np.testing.assert_array_equal(rgb, pixels)


def test_a_bytearray_is_read_like_bytes():
    pixels = colors()
    data = bytearray(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(load_image(data), pixels)


STORED_FROM_UPRIGHT = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: np.rot90,
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1),
}


@pytest.mark.parametrize("orientation", STORED_FROM_UPRIGHT)
def test_exif_orientation_is_undone(orientation):
    upright = colors()
    stored = Image.fromarray(np.ascontiguousarray(STORED_FROM_UPRIGHT[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = load_image(encoded(stored, "PNG", exif=exif))
    assert_is_rgb(rgb, 3, 5)
    np.testing.assert_array_equal(rgb, upright)


def test_exif_orientation_of_a_jpeg_is_undone():
    stored = Image.new("RGB", (32, 16), RED)
    stored.paste(BLUE, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = load_image(encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif))
    assert_is_rgb(rgb, 32, 16)
    assert np.abs(rgb[4, 8].astype(int) - RED).max() < 8
    assert np.abs(rgb[28, 8].astype(int) - BLUE).max() < 8


def test_exif_orientation_of_a_16_bit_picture_is_undone():
    upright = np.arange(6, dtype=np.uint16).reshape(2, 3) * (40 * 257)
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = Image.fromarray(np.ascontiguousarray(upright[::-1, ::-1]))
    rgb = load_image(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(rgb[..., 0], upright // 257)


def test_an_odd_exif_entry_does_not_stop_the_picture_from_being_turned():
    orientation = (0x0112, 3, 1, b"\x06\0\0\0")
    width_as_text = (0x0100, 2, 2, b"a\0\0\0")
    exif = exif_block(width_as_text, orientation)
    assert_is_rgb(load_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)), 4, 2)


def test_an_unknown_orientation_leaves_the_picture_as_it_is():
    pixels = colors()
    exif = Image.Exif()
    exif[0x0112] = 9
    rgb = load_image(encoded(Image.fromarray(pixels), "PNG", exif=exif))
    np.testing.assert_array_equal(rgb, pixels)


def palette_picture():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    return image


def test_a_palette_gives_its_colors():
    rgb = load_image(encoded(palette_picture(), "PNG"))
    np.testing.assert_array_equal(rgb, [[RED, GREEN, BLUE]])


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(form):
    rgb = load_image(encoded(palette_picture(), form, transparency=1))
    np.testing.assert_array_equal(rgb, [[RED, WHITE, BLUE]])


def test_a_palette_with_partial_transparency_is_laid_over_white():
    rgb = load_image(encoded(palette_picture(), "PNG", transparency=bytes([255, 0, 51])))
    np.testing.assert_allclose(rgb, [[RED, WHITE, (204, 204, 255)]], atol=1)


@pytest.mark.parametrize(
    ("mode", "fill", "expected"),
    [
        ("1", 1, WHITE),
        ("1", 0, BLACK),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 255), BLACK),
        ("LA", (0, 0), WHITE),
        ("LA", (0, 51), (204, 204, 204)),
        ("PA", (0, 0), WHITE),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), WHITE),
        ("RGBA", (0, 100, 255, 51), (204, 224, 255)),
        ("RGBa", (0, 0, 0, 0), WHITE),
        ("RGBX", (10, 20, 30, 0), (10, 20, 30)),
        ("CMYK", (0, 0, 0, 0), WHITE),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 255, 255), RED),
        ("I", 200 * 257, (200, 200, 200)),
        ("I;16", 65535, WHITE),
        ("I;16B", 100 * 257, (100, 100, 100)),
    ],
)
def test_every_pillow_mode_becomes_rgb(mode, fill, expected):
    rgb = load_image(Image.new(mode, (3, 2), fill))
    assert_is_rgb(rgb, 2, 3)
    np.testing.assert_allclose(rgb, np.broadcast_to(np.uint8(expected), (2, 3, 3)), atol=1)


def test_a_file_with_alpha_is_laid_over_white():
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [200, 0, 0, 128]]], dtype=np.uint8)
    rgb = load_image(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_allclose(rgb, [[WHITE, BLACK, (227, 127, 127)]], atol=1)


def test_a_transparent_color_of_an_rgb_png_becomes_white():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    rgb = load_image(encoded(image, "PNG", transparency=BLUE))
    np.testing.assert_array_equal(rgb, [[RED, WHITE]])


def test_a_cmyk_jpeg_gives_the_colors_that_it_shows():
    rgb = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert_is_rgb(rgb, 16, 16)
    assert np.abs(rgb.astype(int) - RED).max() <= 4


def test_a_grey_jpeg_is_grey():
    rgb = load_image(encoded(Image.new("L", (8, 8), 90), "JPEG", quality=95))
    assert np.abs(rgb.astype(int) - 90).max() <= 2


def test_a_1_bit_png_is_black_and_white():
    bits = np.array([[True, False, True]])
    rgb = load_image(encoded(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(rgb, [[WHITE, BLACK, WHITE]])


def test_a_16_bit_grey_png_fills_the_8_bit_range():
    values = np.array([[0, 257, 128 * 257, 65534, 65535]], dtype=np.uint16)
    rgb = load_image(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_allclose(rgb[0, :, 0], [0, 1, 128, 254.5, 255], atol=0.5)
    assert rgb[0, 0, 0] == 0
    assert rgb[0, 4, 0] == 255
    np.testing.assert_array_equal(rgb[..., 0], rgb[..., 2])


def test_a_16_bit_color_png_fills_the_8_bit_range():
    row = struct.pack(">6H", 65535, 0, 128 * 257, 0, 65535, 7 * 257)
    rgb = load_image(png(2, 1, 16, 2, [row]))
    np.testing.assert_allclose(rgb, [[(255, 0, 128), (0, 255, 7)]], atol=1)


def test_a_16_bit_grey_png_with_alpha_is_laid_over_white():
    row = struct.pack(">4H", 0, 65535, 0, 0)
    rgb = load_image(png(2, 1, 16, 4, [row]))
    np.testing.assert_array_equal(rgb, [[BLACK, WHITE]])


def test_a_transparent_level_of_a_16_bit_png_becomes_white():
    row = struct.pack(">2H", 0, 100 * 257)
    transparency = (b"tRNS", struct.pack(">H", 0))
    rgb = load_image(png(2, 1, 16, 0, [row], transparency))
    np.testing.assert_array_equal(rgb, [[WHITE, (100, 100, 100)]])


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})],
)
def test_an_animation_gives_its_first_frame(tmp_path, form, options):
    first, *rest = frames(RED, GREEN, BLUE)
    file = tmp_path / "animation"
    first.save(file, form, save_all=True, append_images=rest, **options)
    for source in (file, file.read_bytes()):
        rgb = load_image(source)
        assert_is_rgb(rgb, 3, 4)
        np.testing.assert_array_equal(rgb, np.broadcast_to(np.uint8(RED), (3, 4, 3)))


def test_an_open_animation_gives_its_first_frame_wherever_it_stands():
    first, *rest = frames(RED, GREEN)
    image = Image.open(io.BytesIO(encoded(first, "GIF", save_all=True, append_images=rest)))
    image.seek(1)
    np.testing.assert_array_equal(load_image(image)[0, 0], RED)


def test_a_pillow_image_is_not_changed():
    image = palette_picture()
    load_image(image)
    assert image.mode == "P"
    assert list(image.get_flattened_data()) == [0, 1, 2]


# Arrays


def array_of(dtype, values):
    numbers = np.asarray(values, dtype=np.float64)
    scale = {"uint8": 255, "uint16": 65535, "bool": 1}.get(dtype, 1)
    return (numbers * scale).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)])
def test_every_array_covers_the_full_range(dtype, shape):
    values = np.zeros(shape)
    values[0] = 1
    if shape[-1] == 4:
        values[..., 3] = 1
    array = array_of(dtype, values)
    before = array.copy()
    rgb = load_image(array)
    assert_is_rgb(rgb, 2, 3)
    assert (rgb[0] == 255).all()
    assert (rgb[1] == 0).all()
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float32"])
def test_a_transparent_array_is_laid_over_white(dtype):
    rgb = load_image(array_of(dtype, np.zeros((2, 3, 4))))
    assert (rgb == 255).all()


def test_channels_of_an_array_stay_in_order():
    pixels = colors()
    np.testing.assert_array_equal(load_image(pixels), pixels)
    np.testing.assert_array_equal(load_image(pixels.astype(np.uint16) * 257), pixels)


def test_a_grey_array_fills_all_channels():
    grey = colors(channels=0)
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(load_image(array), np.stack([grey] * 3, axis=-1))


def test_floats_are_rounded_to_the_nearest_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for shift in (-0.49, 0.0, 0.49):
        floats = np.clip((levels + shift) / 255, 0, 1)
        np.testing.assert_array_equal(load_image(floats)[..., 0], levels)


def test_16_bit_values_are_rounded_to_the_nearest_level():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    nearest = np.rint(values / 257)
    np.testing.assert_array_equal(load_image(values)[..., 0], nearest)
    np.testing.assert_array_equal(load_image(Image.fromarray(values))[..., 0], nearest)


@pytest.mark.parametrize(
    "view",
    [lambda a: a[:, ::-1], lambda a: a[::2, ::3], np.asfortranarray, lambda a: a.swapaxes(0, 1)],
)
def test_strided_arrays_come_out_contiguous(view):
    array = view(colors(6, 9))
    rgb = load_image(array)
    assert_is_rgb(rgb, *array.shape[:2])
    np.testing.assert_array_equal(rgb, array)


# Refused sources


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")


def test_a_directory_is_refused_as_one(tmp_path):
    with pytest.raises(ImageDecodeError, match=re.escape(f"{str(tmp_path)!r} is a directory")):
        load_image(tmp_path)


def test_no_bytes_are_refused():
    with pytest.raises(ImageDecodeError, match="0 bytes"):
        load_image(b"")


def test_an_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageDecodeError, match=r"empty\.png"):
        load_image(tmp_path / "empty.png")


def test_a_text_file_is_refused_with_the_accepted_formats(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture at all")
    with pytest.raises(ImageDecodeError, match=r"notes\.png' is not an image.*PNG, JPEG"):
        load_image(tmp_path / "notes.png")
    with pytest.raises(ImageDecodeError, match=r"20 bytes is not an image.*PNG, JPEG"):
        load_image((tmp_path / "notes.png").read_bytes())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.4, 0.8])
def test_a_truncated_file_is_refused_and_not_filled_with_grey(tmp_path, form, kept):
    data = encoded(Image.fromarray(colors(40, 60)), form)
    file = tmp_path / "half"
    file.write_bytes(data[: int(kept * len(data))])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # Pillow's, about a lost TIFF tag
        with pytest.raises(
            ImageDecodeError, match=r"half' (cannot be decoded .*cut short|is not an)"
        ):
            load_image(file)


def test_an_animation_cut_inside_its_first_frame_is_refused():
    first, *rest = (Image.fromarray(colors(40, 60, seed=seed)) for seed in range(2))
    data = encoded(first, "GIF", save_all=True, append_images=rest)
    with pytest.raises(ImageDecodeError, match="cut short"):
        load_image(data[: len(data) // 4])


def test_an_animation_cut_after_its_first_frame_still_gives_that_frame():
    first, *rest = (Image.fromarray(colors(40, 60, seed=seed)) for seed in range(2))
    data = encoded(first, "GIF", save_all=True, append_images=rest)
    np.testing.assert_array_equal(load_image(data[: int(0.8 * len(data))]), load_image(data))


@pytest.mark.parametrize(
    ("width", "height"), [(9_460, 9_459), (20_000, 20_000), (2**31 - 1, 2**31 - 1)]
)
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch, width, height, action):
    def refuse(_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ImageSizeError, match=r"limit"):
            load_image(png(width, height, 8, 2, []))


def test_the_decoding_limit_holds_where_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageSizeError, match=r"20000 x 20000, 400,000,000 pixels; .*scale it down"):
        load_image(png(20_000, 20_000, 8, 2, []))


def test_the_largest_accepted_image_has_exactly_the_limit(monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 20)
    assert_is_rgb(load_image(colors(4, 5)), 4, 5)
    assert_is_rgb(load_image(Image.new("RGB", (5, 4))), 4, 5)
    for source in (colors(3, 7), Image.new("RGB", (7, 3))):
        with pytest.raises(ImageSizeError, match=r"7 x 3, 21 pixels; the limit is 20"):
            load_image(source)


def test_a_huge_array_is_refused_before_it_is_copied():
    with pytest.raises(ImageSizeError, match="limit is 89,478,485"):
        load_image(np.broadcast_to(np.float64(0.5), (10**6, 10**6, 3)))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 5, 3), (5, 0, 4)])
def test_an_array_without_pixels_is_refused(shape):
    with pytest.raises(
        ImageSizeError, match=f"{shape[1]} x {shape[0]}; it needs at least one pixel"
    ):
        load_image(np.zeros(shape, dtype=np.uint8))


def test_a_pillow_image_without_pixels_is_refused():
    with pytest.raises(ImageSizeError, match="0 x 3; it needs at least one pixel"):
        load_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize(
    "shape", [(), (5,), (2, 2, 2), (2, 2, 5), (5, 5, 0), (3, 40, 60), (1, 4, 4, 3)]
)
def test_an_array_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}; accepted: (H, W)")):
        load_image(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint32", "complex64", "object", "U1"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3)])
def test_an_array_of_another_dtype_is_refused(dtype, shape):
    array = np.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=rf"dtype {array.dtype}; accepted: uint8, uint16, bool"):
        load_image(array)


@pytest.mark.parametrize("value", [1.001, 255.0, -0.001, np.inf, -np.inf])
def test_floats_out_of_range_are_refused(value):
    array = np.full((2, 3, 3), 0.5)
    array[1, 2, 0] = value
    low, high = array.min(), array.max()
    with pytest.raises(ValueError, match=re.escape(f"floats from {low:g} to {high:g}; accepted")):
        load_image(array)


def test_an_array_with_nan_is_refused():
    array = np.full((2, 3), 0.5, dtype=np.float32)
    array[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"accepted: \[0, 1\]"):
        load_image(array)


@pytest.mark.parametrize("source", [None, 7, 1.5, ["scene.png"], memoryview(b"x")])
def test_another_type_is_refused_by_name(source):
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
def test_pillow_pixels_of_unknown_range_are_refused(image, reason):
    with pytest.raises(ImageDecodeError, match=reason):
        load_image(image)


def test_a_refused_pixel_range_is_not_called_a_truncated_file():
    with pytest.raises(ImageDecodeError) as refusal:
        load_image(Image.new("F", (2, 2), 0.5))
    assert "cut short" not in str(refusal.value)


def test_a_closed_image_is_refused():
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (2, 2)), "PNG")))
    image.close()
    with pytest.raises(ImageDecodeError, match="closed"):
        load_image(image)


def test_a_damaged_header_is_refused_like_any_other_damage():
    data = encoded(Image.new("RGB", (4, 4)), "DDS")
    flags = struct.pack("<II", 32, 0x40)  # size of the pixel format, then "uncompressed RGB"
    assert data.count(flags) == 1
    with pytest.raises(ImageDecodeError, match="bytes cannot be decoded"):
        load_image(data.replace(flags, struct.pack("<II", 32, 0)))


def test_a_damaged_second_page_does_not_spoil_the_first():
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
def test_damaged_bytes_give_a_picture_or_an_image_error(form, changes, kept):
    data = bytearray(encoded(Image.fromarray(colors(6, 7)), form))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        rgb = load_image(data[: round(kept * len(data))])
    except ImageError as error:
        assert len(str(error)) > 20
    else:
        assert_is_rgb(rgb, *rgb.shape[:2])


# Keys


def test_an_image_key_depends_on_every_pixel_and_on_the_shape():
    rgb = colors(2, 3)
    changed = rgb.copy()
    changed[1, 2, 2] ^= 1
    keys = {image_key(rgb), image_key(changed), image_key(rgb.reshape(3, 2, 3))}
    assert len(keys) == 3


def test_an_image_key_depends_on_nothing_else():
    rgb = colors(4, 6)
    wide = np.repeat(rgb, 2, axis=1)
    assert image_key(rgb) == image_key(rgb.copy()) == image_key(wide[:, ::2])
    assert image_key(rgb) == image_key(load_image(encoded(Image.fromarray(rgb), "PNG")))


# The way in


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1, 1), (1024, 1024)),
        ((480, 640), (768, 1024)),
        ((640, 480), (1024, 768)),
        ((1080, 1920), (576, 1024)),
        ((1000, 1001), (1023, 1024)),
        ((3, 2048), (2, 1024)),  # 1.5 rounds up
        ((5, 2048), (3, 1024)),  # 2.5 rounds up, where Python's round() gives 2
        ((2048, 5), (1024, 3)),
        ((4095, 8192), (512, 1024)),  # 511.875
        ((1, 10_000), (1, 1024)),  # 0.1024 would leave no row
    ],
)
def test_unpadded_size_follows_sam(original, expected):
    assert unpadded_size(*original, 1024) == expected


@PROPERTY
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    image_size=st.sampled_from([64, 128, 1000, 1024]),
)
def test_unpadded_size_keeps_the_aspect_to_half_a_pixel(height, width, image_size):
    new_height, new_width = unpadded_size(height, width, image_size)
    assert max(new_height, new_width) == image_size
    short, new_short = min(height, width), min(new_height, new_width)
    exact = short * image_size / max(height, width)
    assert new_short >= 1
    assert -0.5 <= exact - new_short < 0.5 or (new_short == 1 and exact < 1)
    assert unpadded_size(width, height, image_size) == (new_width, new_height)


def test_prepare_image_normalizes_without_resizing_what_fits():
    geometry = Geometry(
        image_size=16, patch_size=4, pixel_mean=(10.0, 20.0, 30.0), pixel_std=(2.0, 4.0, 8.0)
    )
    rgb = colors(10, 16)
    prepared = prepare_image(rgb, geometry)
    assert prepared.image.shape == (1, 3, 16, 16)
    assert prepared.image.dtype == np.float32
    assert prepared.unpadded_size.dtype == np.int64
    assert prepared.unpadded_size.tolist() == [10, 16]
    assert prepared.original_size == (10, 16)
    expected = (rgb.astype(np.float64) - (10, 20, 30)) / (2, 4, 8)
    np.testing.assert_allclose(prepared.image[0, :, :10].transpose(1, 2, 0), expected, rtol=1e-6)


def test_sam_normalization_has_its_worked_values():
    prepared = prepare_image(np.full((1024, 1024, 3), (255, 0, 104), dtype=np.uint8), SAM)
    np.testing.assert_allclose(prepared.image[0, :, 0, 0], [2.248908, -2.035714, 0.00819172], 1e-5)


@settings(PROPERTY, max_examples=30)
@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 9))
def test_padding_is_zero_after_normalization_and_lies_bottom_right(height, width, seed):
    rgb = np.maximum(colors(height, width, seed=seed), 200)  # nothing near any mean
    before = rgb.copy()
    prepared = prepare_image(rgb, TINY)
    inside_height, inside_width = prepared.unpadded_size
    assert (inside_height, inside_width) == unpadded_size(height, width, 128)
    assert prepared.original_size == (height, width)
    assert (prepared.image[:, :, inside_height:] == 0).all()
    assert (prepared.image[:, :, :, inside_width:] == 0).all()
    assert (prepared.image[:, :, :inside_height, :inside_width] > 1).all()
    np.testing.assert_array_equal(rgb, before)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (40, 31), (500, 90)])
def test_prepare_image_resizes_like_an_antialiased_bilinear_filter(height, width):
    rgb = colors(height, width)
    prepared = prepare_image(rgb, TINY)
    inside = tuple(prepared.unpadded_size.tolist())
    reference = F.interpolate(
        torch.from_numpy(rgb).permute(2, 0, 1)[None].float(),
        inside,
        mode="bilinear",
        antialias=True,
    )[0].numpy()
    mean, std = (np.array(v)[:, None, None] for v in (TINY.pixel_mean, TINY.pixel_std))
    levels = prepared.image[0, :, : inside[0], : inside[1]] * std + mean
    assert np.abs(levels - reference).max() <= 1.01  # Pillow rounds to 8 bits after each side
    assert abs((levels - reference).mean()) < 0.05


# The way back


def logits_of(count, size, seed=0):
    return (5 * np.random.default_rng(seed).standard_normal((count, 1, size, size))).astype(
        np.float32
    )


def prepared_of(height, width, geometry):
    inside = unpadded_size(height, width, geometry.image_size)
    return PreparedImage(np.zeros(0, np.float32), np.array(inside), (height, width))


def chain_of_interpolations(logits, prepared, geometry):
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
def test_resize_logits_equals_the_chain_of_interpolations(height, width, geometry):
    logits = logits_of(2, geometry.mask_size)
    prepared = prepared_of(height, width, geometry)
    resized = resize_logits(logits, prepared, geometry)
    assert resized.shape == (2, height, width)
    assert resized.dtype == np.float32
    reference = chain_of_interpolations(logits, prepared, geometry)
    # Logits reach 20 here, so that 1e-5 is a few roundings of float32.
    np.testing.assert_allclose(resized, reference, rtol=0, atol=1e-5)
    assert abs((resized - reference).mean(dtype=np.float64)) < 1e-6


@settings(PROPERTY, max_examples=30)
@given(height=st.integers(1, 200), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_resized_logits_are_averages_of_what_went_in(height, width, seed):
    logits = logits_of(1, TINY.mask_size, seed)
    prepared = prepared_of(height, width, TINY)
    resized = resize_logits(logits, prepared, TINY)
    assert resized.min() >= logits.min() - 1e-4
    assert resized.max() <= logits.max() + 1e-4
    constant = resize_logits(np.full_like(logits, -3.25), prepared, TINY)
    np.testing.assert_allclose(constant, -3.25, atol=1e-5)


def test_resized_logits_ignore_cells_that_lie_in_the_padding():
    prepared = prepared_of(64, 128, TINY)  # the image ends at cell 32 of 64
    logits = logits_of(1, 64)
    changed = logits.copy()
    changed[:, :, 33:] = 1000  # one cell further still reaches the last row of pixels
    np.testing.assert_array_equal(
        resize_logits(logits, prepared, TINY), resize_logits(changed, prepared, TINY)
    )


def test_no_targets_give_no_logits():
    empty = np.zeros((0, 1, 64, 64), dtype=np.float32)
    assert resize_logits(empty, prepared_of(20, 30, TINY), TINY).shape == (0, 20, 30)


# The picture for the policy


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (3_136, 705_600), (480, 640)),
        ((840, 840), (3_136, 705_600), (840, 840)),
        ((56, 56), (3_136, 705_600), (56, 56)),
        ((1680, 1680), (3_136, 705_600), (840, 840)),
        ((1080, 1920), (3_136, 705_600), (630, 1120)),
        ((28, 28), (3_136, 705_600), (56, 56)),
        ((10, 40), (3_136, 705_600), (28, 112)),
        ((1, 1), (3_136, 705_600), (56, 56)),
        ((11, 13), (3_136, 705_600), (52, 61)),  # both sides up
        ((1000, 1300), (3_136, 705_600), (736, 957)),  # both sides down
    ],
)
def test_fit_pixel_count_has_its_worked_values(size, limits, expected):
    picture = fit_pixel_count(np.zeros((*size, 3), dtype=np.uint8), *limits)
    assert (picture.height, picture.width) == expected
    assert picture.mode == "RGB"


@PROPERTY
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    min_pixels=st.integers(1, 2_000),
    room=st.integers(4, 40),
)
def test_fit_pixel_count_keeps_its_limits_and_the_aspect(height, width, min_pixels, room):
    max_pixels = min_pixels * room
    assume(max(height, width) <= max_pixels * min(height, width))
    assume(max(height, width) <= min_pixels or height * width >= min_pixels)
    picture = fit_pixel_count(np.zeros((height, width, 3), dtype=np.uint8), min_pixels, max_pixels)
    area = height * width
    if min_pixels <= area <= max_pixels:
        assert (picture.height, picture.width) == (height, width)
        return
    assert picture.height * picture.width <= max_pixels
    assert picture.height * picture.width >= min(min_pixels, max_pixels)
    exact_scale = ((max_pixels if area > max_pixels else min_pixels) / area) ** 0.5
    for new, old in ((picture.height, height), (picture.width, width)):
        assert abs(new - old * exact_scale) < 1 + 1e-9


def test_fit_pixel_count_keeps_the_upper_limit_for_a_line_of_pixels():
    picture = fit_pixel_count(np.zeros((1, 4_000, 3), dtype=np.uint8), 16, 1_000)
    assert picture.height * picture.width <= 1_000


def test_fit_pixel_count_keeps_the_upper_limit_when_it_equals_the_lower_one():
    picture = fit_pixel_count(np.zeros((10, 17, 3), dtype=np.uint8), 784, 784)
    assert picture.height * picture.width <= 784


def test_a_picture_inside_the_limits_is_not_touched():
    rgb = colors(30, 40)
    np.testing.assert_array_equal(np.asarray(fit_pixel_count(rgb, 100, 10_000)), rgb)


def test_a_flat_picture_stays_flat_when_it_is_scaled():
    for size in (4, 400):
        rgb = np.full((size, size, 3), (12, 200, 77), dtype=np.uint8)
        picture = np.asarray(fit_pixel_count(rgb, 400, 4_000))
        assert (picture == (12, 200, 77)).all()


@pytest.mark.parametrize(("height", "width"), [(60, 90), (15, 12)])
def test_fit_pixel_count_resizes_like_an_antialiased_bicubic_filter(height, width):
    rgb = np.clip(colors(height, width), 40, 215)
    picture = np.asarray(fit_pixel_count(rgb, 1_000, 2_000))
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    reference = F.interpolate(pixels, picture.shape[:2], mode="bicubic", antialias=True)
    levels = reference[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(picture - levels).max() <= 2  # Pillow rounds to 8 bits after each side
    assert abs((picture - levels).mean()) < 0.05
