"""Decoding of every source and image format to upright 8-bit RGB."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.images import load_image
from tests.unit.image_samples import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    WHITE,
    assert_is_rgb,
    colors,
    encoded,
    exif_block,
    frames,
    png,
)


@pytest.mark.parametrize("as_source", [str, Path, Path.read_bytes, Image.open, np.asarray])
def test_load_image_gives_the_same_pixels_for_every_source(tmp_path, as_source):
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


def test_load_image_reads_a_bytearray_like_bytes():
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


def test_exif_orientation_of_a_16_bit_image_is_undone():
    upright = np.arange(6, dtype=np.uint16).reshape(2, 3) * (40 * 257)
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = Image.fromarray(np.ascontiguousarray(upright[::-1, ::-1]))
    rgb = load_image(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(rgb[..., 0], upright // 257)


def test_exif_orientation_is_undone_despite_an_invalid_entry():
    orientation = (0x0112, 3, 1, b"\x06\0\0\0")
    width_as_text = (0x0100, 2, 2, b"a\0\0\0")
    exif = exif_block(width_as_text, orientation)
    assert_is_rgb(load_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)), 4, 2)


def test_unknown_exif_orientation_is_ignored():
    pixels = colors()
    exif = Image.Exif()
    exif[0x0112] = 9
    rgb = load_image(encoded(Image.fromarray(pixels), "PNG", exif=exif))
    np.testing.assert_array_equal(rgb, pixels)


def palette_image():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    return image


def test_palette_gives_its_colors():
    rgb = load_image(encoded(palette_image(), "PNG"))
    np.testing.assert_array_equal(rgb, [[RED, GREEN, BLUE]])


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(form):
    rgb = load_image(encoded(palette_image(), form, transparency=1))
    np.testing.assert_array_equal(rgb, [[RED, WHITE, BLUE]])


def test_palette_with_partial_transparency_is_composited_on_white():
    rgb = load_image(encoded(palette_image(), "PNG", transparency=bytes([255, 0, 51])))
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


def test_file_with_alpha_is_composited_on_white():
    pixels = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [200, 0, 0, 128]]], dtype=np.uint8)
    rgb = load_image(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_allclose(rgb, [[WHITE, BLACK, (227, 127, 127)]], atol=1)


def test_transparent_color_of_an_rgb_png_becomes_white():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    rgb = load_image(encoded(image, "PNG", transparency=BLUE))
    np.testing.assert_array_equal(rgb, [[RED, WHITE]])


def test_cmyk_jpeg_gives_its_displayed_colors():
    rgb = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert_is_rgb(rgb, 16, 16)
    assert np.abs(rgb.astype(int) - RED).max() <= 4


def test_grey_jpeg_is_grey():
    rgb = load_image(encoded(Image.new("L", (8, 8), 90), "JPEG", quality=95))
    assert np.abs(rgb.astype(int) - 90).max() <= 2


def test_1_bit_png_is_black_and_white():
    bits = np.array([[True, False, True]])
    rgb = load_image(encoded(Image.fromarray(bits), "PNG"))
    np.testing.assert_array_equal(rgb, [[WHITE, BLACK, WHITE]])


def test_16_bit_grey_png_fills_the_8_bit_range():
    values = np.array([[0, 257, 128 * 257, 65534, 65535]], dtype=np.uint16)
    rgb = load_image(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_allclose(rgb[0, :, 0], [0, 1, 128, 254.5, 255], atol=0.5)
    assert rgb[0, 0, 0] == 0
    assert rgb[0, 4, 0] == 255
    np.testing.assert_array_equal(rgb[..., 0], rgb[..., 2])


def test_16_bit_color_png_fills_the_8_bit_range():
    row = struct.pack(">6H", 65535, 0, 128 * 257, 0, 65535, 7 * 257)
    rgb = load_image(png(2, 1, 16, 2, [row]))
    np.testing.assert_allclose(rgb, [[(255, 0, 128), (0, 255, 7)]], atol=1)


def test_16_bit_grey_png_with_alpha_is_composited_on_white():
    row = struct.pack(">4H", 0, 65535, 0, 0)
    rgb = load_image(png(2, 1, 16, 4, [row]))
    np.testing.assert_array_equal(rgb, [[BLACK, WHITE]])


def test_transparent_level_of_a_16_bit_png_becomes_white():
    row = struct.pack(">2H", 0, 100 * 257)
    transparency = (b"tRNS", struct.pack(">H", 0))
    rgb = load_image(png(2, 1, 16, 0, [row], transparency))
    np.testing.assert_array_equal(rgb, [[WHITE, (100, 100, 100)]])


@pytest.mark.parametrize(
    ("form", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})],
)
def test_animation_gives_its_first_frame(tmp_path, form, options):
    first, *rest = frames(RED, GREEN, BLUE)
    file = tmp_path / "animation"
    first.save(file, form, save_all=True, append_images=rest, **options)
    for source in (file, file.read_bytes()):
        rgb = load_image(source)
        assert_is_rgb(rgb, 3, 4)
        np.testing.assert_array_equal(rgb, np.broadcast_to(np.uint8(RED), (3, 4, 3)))


def test_open_animation_gives_its_first_frame_from_any_position():
    first, *rest = frames(RED, GREEN)
    image = Image.open(io.BytesIO(encoded(first, "GIF", save_all=True, append_images=rest)))
    image.seek(1)
    np.testing.assert_array_equal(load_image(image)[0, 0], RED)


def test_load_image_does_not_change_a_pillow_image():
    image = palette_image()
    load_image(image)
    assert image.mode == "P"
    assert list(image.get_flattened_data()) == [0, 1, 2]


def array_of(dtype, values):
    numbers = np.asarray(values, dtype=np.float64)
    scale = {"uint8": 255, "uint16": 65535, "bool": 1}.get(dtype, 1)
    return (numbers * scale).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)])
def test_array_of_any_dtype_covers_the_full_range(dtype, shape):
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
def test_transparent_array_is_composited_on_white(dtype):
    rgb = load_image(array_of(dtype, np.zeros((2, 3, 4))))
    assert (rgb == 255).all()


def test_array_channels_stay_in_order():
    pixels = colors()
    np.testing.assert_array_equal(load_image(pixels), pixels)
    np.testing.assert_array_equal(load_image(pixels.astype(np.uint16) * 257), pixels)


def test_grey_array_fills_all_channels():
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


@pytest.mark.parametrize("shape", [(1, 70_000), (300, 301), (70_000, 1), (217, 302)])
def test_image_of_several_strips_keeps_every_pixel(shape):
    rgb = colors(*shape)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(rgb), "PNG")), rgb)


@pytest.mark.parametrize(
    "view",
    [lambda a: a[:, ::-1], lambda a: a[::2, ::3], np.asfortranarray, lambda a: a.swapaxes(0, 1)],
)
def test_strided_array_becomes_contiguous(view):
    array = view(colors(6, 9))
    rgb = load_image(array)
    assert_is_rgb(rgb, *array.shape[:2])
    np.testing.assert_array_equal(rgb, array)
