"""Images of rows on disk: bytes, base64, the image of Hugging Face datasets, or a path."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import xxhash
from PIL import ExifTags, Image

from coprs_deploy.data.rle import json_type
from coprs_deploy.data.rows import FieldError
from coprs_deploy.images import RgbArray, load_image

_COCO_STEM = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})(?:_\d+)?")
"""Name of an image of COCO, with the number of an annotation in the names of REFER."""


def image_source(row: Mapping[str, Any], directory: Path) -> tuple[str, bytes | Path]:
    """Return the column of a row's image, and its bytes or path.

    Raises:
        FieldError: the row has no image, two of them, or one of another form.
    """
    given = [name for name in ("image", "image_path") if row.get(name) is not None]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise FieldError(
            "image", f"the row must have exactly one of image and image_path; it has {found}"
        )
    column = given[0]
    path, data = (row[column], None) if column == "image_path" else (None, row[column])
    if isinstance(data, Mapping):
        path, data = data.get("path"), data.get("bytes")
    if isinstance(data, bytes):
        return column, data
    if isinstance(data, str):
        try:
            return column, base64.b64decode(data, validate=True)
        except ValueError as error:
            raise FieldError(
                column,
                "image is text that is not base64; accepted: base64 of an image file, without "
                "line breaks or a data: prefix; a path belongs in image_path",
            ) from error
    if data is not None or not isinstance(path, str):
        found = json_type(path if data is None else data)
        accepted = 'bytes, base64 or {"bytes": ..., "path": ...}' if column == "image" else "text"
        raise FieldError(column, f"{column} is {found}; accepted: {accepted}")
    if "://" in path:
        raise FieldError(column, f"{path} is a URL, which is not fetched; download the image")
    return column, directory / path


def row_image_name(row: Mapping[str, Any]) -> str:
    """Return the name of a row's image from its path, or a hash of its bytes.

    Raises:
        FieldError: the row has no image, two of them, or one of another form.
    """
    image = row.get("image")
    path = image.get("path") if isinstance(image, Mapping) else None
    source = Path(path) if path else image_source(row, Path())[1]
    return image_name_of(source)


def image_name_of(source: bytes | PurePath) -> str:
    """Return the name that the copies of an image share, from its bytes or the path of one.

    An image of COCO is named by its number, because ``COCO_train2014_000000000009.jpg`` and
    ``000000000009.jpg`` are the same image. Bytes are named by their hash.
    """
    if isinstance(source, bytes):
        return f"bytes-{xxhash.xxh3_128_hexdigest(source)}"
    number = _COCO_STEM.fullmatch(source.stem)
    return f"coco-{int(number[1])}" if number else source.stem


def load_image_source(source: bytes | Path, column: str) -> RgbArray:
    """Decode the image of a column; FieldError if that is impossible."""
    try:
        if isinstance(source, Path) and not source.is_file():
            raise FileNotFoundError
        return load_image(source)
    except FileNotFoundError as error:
        raise FieldError(column, f"the image file {source!s} does not exist") from error
    except PermissionError as error:
        raise FieldError(column, f"no permission to read the image file {source!s}") from error
    except (OSError, ValueError) as error:
        raise FieldError(column, str(error)) from error


def orientation_hint(source: bytes | Path) -> str:
    """Return the frame of the masks if the image has an EXIF orientation."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation not in range(2, 9):
            return ""
        return (
            f"; the image is stored as [{image.height}, {image.width}] with the EXIF orientation "
            f"{orientation}, and masks are in the frame of the upright image, as viewers show it"
        )
