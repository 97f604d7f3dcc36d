"""Rows in, rows out, and the columns of the part files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import msgspec
from numpy.typing import NDArray

from coprs_deploy.data.rle import Rle
from coprs_deploy.data.rows import import_pyarrow
from coprs_deploy.errors import ArtifactError
from coprs_deploy.runtime.result import Timings
from coprs_deploy.specs import Record

FINGERPRINT_KEY, FAILED_KEY = b"coprs_deploy.fingerprint", b"coprs_deploy.num_failed"
"""Metadata of a part file: of which run it is a part, and how many of its rows failed."""

ROWS_PER_GROUP = 1000


@dataclass(frozen=True)
class InputRow:
    """One instruction about one image.

    Attributes:
        row: number of the row in the source, from 0.
        id: name of the row in the source.
        image: name of the image, for people.
        instruction: what to segment.
        location: path or URL of the image file; empty if ``content`` has it.
        content: the bytes of the image file, or an array as ``images.load_image`` takes it; None if
            it is at ``location``.
        image_id: id of the image in COCO results.
        problem: why the row cannot be segmented; empty for a valid row.
    """

    row: int
    id: str
    image: str
    instruction: str
    location: str = ""
    content: bytes | NDArray[Any] | None = None
    image_id: str = ""
    problem: str = ""


class OutputRow(Record, frozen=True, kw_only=True):
    """The result of one row, or its error.

    Attributes:
        row: number of the row in the source, from 0.
        id: name of the row in the source.
        image: name of the image.
        image_id: id of the image in COCO results.
        instruction: the request.
        found: whether the policy named a target.
        masks: compressed COCO RLE of each target.
        boxes: x1, y1, x2, y2 in pixels of each target, x2 and y2 exclusive.
        areas: area in pixels of each target.
        scores: stability score of each mask in [0, 1].
        mask_files: PNG file of each mask, if they are saved.
        reasoning: text inside ``<think>``.
        response: whole text of the policy.
        stop_reason: why the response ended.
        format_violations: deviations from the response format.
        image_size: height and width in pixels; empty if the row failed.
        timings: wall times and token counts.
        error: what went wrong; empty for a result.
        error_type: class of the error.
        bundle: fingerprint of the bundle.
        runtime: description of graphs and policy.
        version: version of this package.
    """

    row: int
    id: str
    image: str
    image_id: str = ""
    instruction: str
    found: bool = False
    masks: list[Rle] = []
    boxes: list[list[int]] = []
    areas: list[int] = []
    scores: list[float] = []
    mask_files: list[str] = []
    reasoning: str = ""
    response: str = ""
    stop_reason: str = ""
    format_violations: list[str] = []
    image_size: list[int] = []
    timings: dict[str, float] = {}
    error: str = ""
    error_type: str = ""
    bundle: str = ""
    runtime: str = ""
    version: str = ""


def encode_part(rows: Sequence[OutputRow], fingerprint: str) -> bytes:
    """Return rows as a Parquet file.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    num_failed = sum(bool(row.error) for row in rows)
    notes = {FINGERPRINT_KEY: fingerprint.encode(), FAILED_KEY: str(num_failed).encode()}
    schema = _schema(pyarrow).with_metadata(notes)
    content = io.BytesIO()
    with pyarrow.parquet.ParquetWriter(content, schema) as file:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            file.write_table(to_table(rows[start : start + ROWS_PER_GROUP]))
    return content.getvalue()


def to_table(rows: Sequence[OutputRow]) -> Any:
    """Return rows as a table of pyarrow, with the columns of the part files.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    return pyarrow.Table.from_pylist([_to_columns(row) for row in rows], schema=_schema(pyarrow))


def read_part(path: Path | str, file: IO[bytes] | None = None) -> list[OutputRow]:
    """Read the rows of a part file.

    Args:
        path: the file; for messages alone if ``file`` is given.
        file: the opened file.

    Raises:
        ArtifactError: it cannot be read, or is no part file.
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    try:
        columns = pyarrow.parquet.ParquetFile(file or path).read().to_pylist()
        return [msgspec.convert(_from_columns(row), OutputRow) for row in columns]
    except (pyarrow.ArrowException, OSError, msgspec.ValidationError) as error:
        raise ArtifactError(f"{path} cannot be read as a part file: {error}") from error


def read_part_notes(path: Path | str, file: IO[bytes] | None = None) -> tuple[str, int, int]:
    """Return fingerprint, number of rows and number of failed rows of a part file.

    Args:
        path: the file; for messages alone if ``file`` is given.
        file: the opened file.

    Raises:
        ArtifactError: it cannot be read, or is no part file.
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow = import_pyarrow()
    try:
        found = pyarrow.parquet.read_metadata(file or path)
        notes = found.metadata or {}
        return notes[FINGERPRINT_KEY].decode(), found.num_rows, int(notes[FAILED_KEY])
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a part file: {error}") from error


def _schema(pyarrow: Any) -> Any:
    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    texts = pyarrow.list_(text)
    rle = pyarrow.struct([("size", pyarrow.list_(pyarrow.int32())), ("counts", text)])
    timings = pyarrow.struct([(field.name, real) for field in fields(Timings)])
    others = {
        "row": whole,
        "found": pyarrow.bool_(),
        "masks": pyarrow.list_(rle),
        "boxes": pyarrow.list_(pyarrow.list_(pyarrow.int32())),
        "areas": pyarrow.list_(whole),
        "scores": pyarrow.list_(real),
        "mask_files": texts,
        "format_violations": texts,
        "image_size": pyarrow.list_(pyarrow.int32()),
        "timings": timings,
    }
    return pyarrow.schema(dict.fromkeys(OutputRow.__struct_fields__, text) | others)


def _to_columns(row: OutputRow) -> dict[str, Any]:
    return {**row.to_json(), "timings": row.timings or None}


def _from_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "timings": row["timings"] or {}}
