"""Image decoding, and preprocessing for SAM and for the policy, with numpy and Pillow only.

The graphs take what :func:`prepare_image` returns.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from coprs_deploy.errors import (
    ImageDecodeError,
    ImageError,
    ImageSizeError,
    import_failure,
    shorten,
)
from coprs_deploy.specs import Geometry, ValidRegion

ImageSource: TypeAlias = str | PathLike[str] | bytes | bytearray | Image.Image | NDArray[Any]
"""A path, the bytes of an image file, a Pillow image, or an array (H, W), (H, W, 1 | 3 | 4)."""

RgbArray: TypeAlias = NDArray[np.uint8]
"""(H, W, 3) uint8, RGB, upright, C-contiguous."""

MAX_IMAGE_PIXELS = 89_478_485
"""Decoding limit: Pillow's own warning level, 256 MiB as RGB."""

MAX_ASPECT_RATIO = 200
"""Largest ratio of the sides of an image for a policy: the limit of Qwen2.5-VL."""

_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_HEIC = re.compile(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)
"""Start of an HEIC file, with its brand."""
HEIC_BYTES = 12

_INTEGER_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

STRIP_PIXELS = 1 << 16
"""Pixels that fit into a processor's cache: 12 megapixels take 34 ms instead of 78."""

REDUCING_GAP = 3.0
"""Policy images that shrink by at least twice this factor are first averaged over whole pixels:
4096 to 128 pixels takes 16 ms instead of 91. Pillow's recommended value; colors of the example
scene differ by at most 2 of 255."""

UINT16_TO_UINT8 = 257
"""65535 / 255: maps the full 16-bit range to the full 8-bit range."""


def load_image(source: ImageSource) -> RgbArray:
    """Decode any image that Pillow reads to upright RGB.

    EXIF orientation is applied, transparency is composited on white, 16-bit values are scaled to 8
    bits, palettes, grey and CMYK are converted, and an animation gives its first frame.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array of shape (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4): uint8, uint16, bool, or float in [0, 1]. Channels are RGB(A).

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageDecodeError: the source is not a readable image, or is a URL.
        ImageSizeError: the image has no pixels, or more than ``MAX_IMAGE_PIXELS``.
        FileNotFoundError: the path does not exist.
        ValueError: shape, dtype or range of the array, or the type of the source, is not accepted.
    """
    if isinstance(source, np.ndarray):
        return _rgb_from_array(source)
    if isinstance(source, Image.Image):
        return _decode(lambda: nullcontext(source), "the Pillow image")
    if isinstance(source, (bytes, bytearray)):
        if not source:
            raise ImageDecodeError("the image has 0 bytes; accepted: the bytes of an image file")
        data = bytes(source)
        return _decode(lambda: _open(io.BytesIO(data)), f"the image of {len(data)} bytes")
    if isinstance(source, (str, PathLike)):
        path = fspath(source)
        what = f"the image {shorten(path)!r}"
        if _URL.match(path):
            raise ImageDecodeError(
                f"{what} is a URL; URLs are not fetched: pass a path, or the bytes of the file"
            )
        return _decode(lambda: _open(path), what)
    raise ValueError(
        f"image is a {type(source).__name__}; accepted: a path, bytes, a PIL image or a numpy array"
    )


def decoded_bytes(file: IO[bytes]) -> int:
    """Read the size of an image file's pixels as RGB from its header; 0 if it will be refused."""
    try:
        with _open(file) as image:
            num_pixels = image.width * image.height
    except MemoryError:
        raise
    except Exception:  # decoding reports it
        return 0
    return 3 * num_pixels if num_pixels <= MAX_IMAGE_PIXELS else 0


def image_key(rgb: RgbArray) -> str:
    """Return a content hash of a decoded image that is stable across processes."""
    digest = hashlib.blake2b(str(rgb.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _open(file: str | IO[bytes]) -> Image.Image:
    """Open an image file, HEIC with pillow-heif if that is installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if isinstance(file, str):
            with Path(file).open("rb") as opened:
                start = opened.read(HEIC_BYTES)
        else:
            file.seek(0)
            start = file.read(HEIC_BYTES)
            file.seek(0)
        if not _HEIC.match(start):
            raise
    try:
        import pillow_heif
    except ImportError as error:
        remedy = "pip install pillow-heif, or convert the image to JPEG or PNG"
        need = "the image is HEIC, for which Pillow"
        failure = import_failure(error, "pillow_heif", remedy, title="pillow-heif", needed_by=need)
        raise ImageDecodeError(str(failure)) from error
    pillow_heif.register_heif_opener()
    return Image.open(file)


def _decode(opening: Callable[[], AbstractContextManager[Image.Image]], what: str) -> RgbArray:
    try:
        with opening() as image:
            _check_size(image.width, image.height, what)
            if image.tell():
                image.seek(0)
            image.load()
            return _pixels(_to_rgb(_upright(image)))
    except (FileNotFoundError, PermissionError, MemoryError, ImageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSizeError(
            f"{what} has too many pixels; the limit is {MAX_IMAGE_PIXELS:,}: scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageDecodeError(
            f"{what} is not an image that Pillow can read; accepted: PNG, JPEG, WebP, TIFF, BMP, "
            "GIF, AVIF and the like"
        ) from error
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes
        if isinstance(error, OSError) and error.strerror:
            raise ImageDecodeError(
                f"{what} cannot be opened: {error.strerror}; accepted: an image file"
            ) from error
        raise ImageDecodeError(
            f"{what} cannot be decoded ({shorten(str(error))}); it may be cut short: open it in a "
            "viewer, or save it again"
        ) from error


def _pixels(image: Image.Image) -> RgbArray:
    """Copy the pixels of an RGB image; in strips, because Pillow copies what it converts twice."""
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _upright(image: Image.Image) -> Image.Image:
    """Undo the EXIF orientation; unlike ``ImageOps.exif_transpose``, without writing EXIF."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _INTEGER_MODES:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise ImageDecodeError(
                "the image has integer pixels outside 0..65535; scale them first"
            )
        grey = _from_16_bit(values)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ImageDecodeError(
            "the image has floats of unknown range; pass an array in [0, 1] instead"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, rounding to the nearest level."""
    half = UINT16_TO_UINT8 // 2
    return ((values.astype(np.uint32) + half) // UINT16_TO_UINT8).astype(np.uint8)


def _rgb_from_array(array: NDArray[Any]) -> RgbArray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"image has shape {array.shape}; accepted: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    _check_size(array.shape[1], array.shape[0], "the image array")
    if array.dtype == np.uint16:
        array = _from_16_bit(array)
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype.kind == "f":
        if np.isnan(array).any():
            raise ValueError("image holds NaN; accepted: [0, 1], or uint8 in 0..255")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"image holds floats from {array.min():g} to {array.max():g}; accepted: [0, 1], "
                "or uint8 in 0..255"
            )
        array = np.rint(array * 255)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"image has dtype {array.dtype}; accepted: uint8, uint16, bool, or float in [0, 1]"
        )
    pixels = array.astype(np.uint8, copy=False)
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return pixels.copy(order="C")  # the caller may reuse its buffer during the request
    pixels = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))


def _check_size(width: int, height: int, what: str) -> None:
    if width < 1 or height < 1:
        raise ImageSizeError(f"{what} is {width} x {height}; it needs at least one pixel")
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageSizeError(
            f"{what} is {width} x {height}, {width * height:,} pixels; the limit is "
            f"{MAX_IMAGE_PIXELS:,}: scale it down first"
        )


@dataclass(frozen=True)
class ResizeTransform:
    """Resize of an image to the longer side S, which maps outputs of the graphs back to the image.

    Attributes:
        unpadded_size: int64 (2,), height and width of the resized image in pixels.
        original_size: height and width of the original image in pixels.
    """

    unpadded_size: NDArray[np.int64]
    original_size: tuple[int, int]

    @classmethod
    def of(cls, rgb: RgbArray, geometry: Geometry) -> ResizeTransform:
        """Compute the resize of an image, (H, W, 3), from its size alone."""
        height, width = rgb.shape[:2]
        resized = unpadded_size(height, width, geometry.image_size)
        return ResizeTransform(np.array(resized, dtype=np.int64), (height, width))


@dataclass(frozen=True)
class PreparedImage(ResizeTransform):
    """Input of the image encoder, with its resize.

    Attributes:
        image: (1, 3, S, S) float32, normalized RGB, zero in the padding.
    """

    image: NDArray[np.float32]


def unpadded_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Scale a size so that its longer side is ``image_size``, rounding half up as SAM does."""
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def check_valid_region(resize: ResizeTransform, valid_region: ValidRegion | None) -> None:
    """Refuse an image that does not fit the valid region of an image encoder.

    Raises:
        ImageSizeError: the resized image exceeds the valid region; the message states what fits.
    """
    resized = resize.unpadded_size.tolist()
    if valid_region is None or valid_region.contains(resized):
        return
    height, width = resize.original_size
    if resized[0] > valid_region.height:
        limit = _longest_fit(width, valid_region.height, valid_region.width)
        fits = f"at width {width} the height may be {limit}"
    else:
        limit = _longest_fit(height, valid_region.width, valid_region.height)
        fits = f"at height {height} the width may be {limit}"
    raise ImageSizeError(
        f"the image is {width} x {height}; this image encoder accepts {valid_region}: {fits}; crop "
        "the image, or export with another --aspect-ratio or without one"
    )


def _longest_fit(long_side: int, limit: int, image_size: int) -> int:
    """Largest short side that is at most ``limit`` once ``long_side`` is resized to S."""
    return max(1, math.ceil((limit + 0.5) * long_side / image_size) - 1)


def prepare_image(rgb: RgbArray, geometry: Geometry) -> PreparedImage:
    """Resize the longer side to S, normalize, and pad bottom and right.

    Args:
        rgb: (H, W, 3) uint8.
        geometry: image size and normalization of the model.

    Returns:
        The image encoder's input.
    """
    size, resize = geometry.image_size, ResizeTransform.of(rgb, geometry)
    height, width = resize.unpadded_size.tolist()
    resized = rgb
    if (height, width) != rgb.shape[:2]:
        pil_image = Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR)
        resized = np.asarray(pil_image)
    image = np.zeros((1, 3, size, size), dtype=np.float32)
    inside = image[0, :, :height, :width]
    mean = np.asarray(geometry.pixel_mean, dtype=np.float32)[:, None, None]
    std = np.asarray(geometry.pixel_std, dtype=np.float32)[:, None, None]
    np.subtract(resized.transpose(2, 0, 1), mean, out=inside, dtype=np.float32)
    np.divide(inside, std, out=inside)
    return PreparedImage(resize.unpadded_size, resize.original_size, image)


def fit_pixel_count(rgb: RgbArray, min_pixels: int, max_pixels: int) -> Image.Image:
    """Scale an image to an area between two pixel counts, keeping its aspect ratio.

    Both sides are rounded down after shrinking and up after growing, so that the limits hold; the
    longer side is at most ``MAX_ASPECT_RATIO`` times the shorter one.

    Args:
        rgb: (H, W, 3) uint8.
        min_pixels: smallest area that the policy accepts (3,136 for Qwen2.5-VL).
        max_pixels: largest area (705,600 for CoPRS).

    Returns:
        The input of the policy's image processor.

    Raises:
        ImageSizeError: the aspect ratio exceeds ``MAX_ASPECT_RATIO``.
    """
    height, width = rgb.shape[:2]
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageSizeError(
            f"the image is {width} x {height}, an aspect ratio of "
            f"{max(height, width) / min(height, width):.4g}; the policy accepts at most "
            f"{MAX_ASPECT_RATIO}: crop or pad the image"
        )
    image = Image.fromarray(rgb)
    if min_pixels <= height * width <= max_pixels:
        return image
    limit, rounded = (
        (max_pixels, math.floor) if height * width > max_pixels else (min_pixels, math.ceil)
    )
    factor = math.sqrt(limit / (height * width))
    new_width, new_height = (max(1, rounded(side * factor)) for side in (width, height))
    if new_width * new_height > max_pixels:  # one pixel high, or limits close together
        if new_width > new_height:
            new_width = max(1, max_pixels // new_height)
        else:
            new_height = max(1, max_pixels // new_width)
    size = (
        min(new_width, MAX_ASPECT_RATIO * new_height),
        min(new_height, MAX_ASPECT_RATIO * new_width),
    )
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
