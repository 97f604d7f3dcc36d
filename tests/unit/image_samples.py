"""Images and files for tests of image decoding."""

import io
import struct
import zlib

import numpy as np
from hypothesis import settings
from PIL import Image

from coprs_deploy.specs import Geometry

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
SAM = Geometry()
TINY = Geometry(image_size=128, patch_size=8, out_chans=64)

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
