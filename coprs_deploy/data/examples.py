"""Examples (image, instruction, ground-truth masks, response) and the files that hold them.

Every source of examples is a ``Sequence[Example]``: generated scenes, and the files that are read
here. A file is Parquet (``.parquet``) or JSON lines (``.jsonl``, UTF-8), with the same columns:

    id                             text or integer
    instruction                    text
    masks                          list with one COCO segmentation per target: RLE,
                                   {"size": [height, width], "counts": text, bytes or integers}, or
                                   polygons, [[x1, y1, x2, y2, ...], ...]; [] if nothing matches;
                                   or the Sequence of RLE of Hugging Face datasets
    image or image_path            bytes of an image file (base64 in JSON), or the image of Hugging
                                   Face datasets, {"bytes": ..., "path": ...}; or the path of an
                                   image file, relative to the example file
    response, question_type,       text, optional
    source

Masks are in the frame of the upright image: a file with an EXIF orientation is turned first, as by
viewers, annotation tools in a browser, OpenCV and detectron2, but not by ``PIL.Image.open`` alone.

Opening a file validates every row. Invalid rows are skipped and reported with row, column and
reason; a file without a valid row is an error. Other columns are ignored and named.
:mod:`coprs_deploy.data.rows` reads and writes the rows on disk.
"""

from __future__ import annotations

import base64
import difflib
import io
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.data.rle import decode_mask, encode_mask, json_type
from coprs_deploy.data.rows import COLUMNS, ExampleRow, FieldError, open_rows, row_writer
from coprs_deploy.errors import ArtifactError, NoValidRowError
from coprs_deploy.images import RgbArray, load_image
from coprs_deploy.prompts import REFERENCE_TOKEN, check_instruction

REPORTED = 5
"""Invalid rows and ignored columns listed in a warning; :class:`ExampleFile` has all of them."""


@dataclass(frozen=True, eq=False)
class Example:
    """One instruction about one image, with its ground truth.

    Attributes:
        id: name that is unique within its source, as in ``plain-17``.
        image: (H, W, 3) uint8 RGB.
        instruction: the user's text.
        masks: (N, H, W) bool ground truth, one mask per target in the order of the response; N is 0
            for a no-match example.
        response: target response of the policy, with one ``<REF_POS>`` per target; empty if the
            data set has none.
        question_type: type of question, for metrics by type; may be empty.
        source: data set or preset that the example comes from; may be empty.

    Raises:
        FieldError: a shape or dtype is wrong, a mask is empty, the instruction is blank, or the
            number of ``<REF_POS>`` in the response differs from the number of masks.
    """

    id: str
    image: RgbArray
    instruction: str
    masks: NDArray[np.bool_]
    response: str = ""
    question_type: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        try:
            check_instruction(self.instruction)
        except ValueError as error:
            raise FieldError("instruction", str(error)) from error
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise FieldError(
                "image",
                f"image is {self.image.dtype} {self.image.shape}; accepted: uint8 (H, W, 3)",
            )
        height, width = self.image.shape[:2]
        if self.masks.dtype != np.bool_ or self.masks.shape[1:] != (height, width):
            raise FieldError(
                "masks",
                f"masks are {self.masks.dtype} {self.masks.shape}; accepted: bool "
                f"(N, {height}, {width}), the size of the image",
            )
        for number, mask in enumerate(self.masks, start=1):
            if not mask.any():
                raise FieldError(
                    "masks",
                    f"mask {number} is empty; leave out a target that is not visible, or write a "
                    "no-match example without masks",
                )
        references = self.response.count(REFERENCE_TOKEN)
        if self.response and references != len(self.masks):
            raise FieldError(
                "response",
                f"the response holds {references} {REFERENCE_TOKEN} for {len(self.masks)} masks; "
                "it must hold one for each",
            )


@dataclass(frozen=True)
class RowProblem:
    """An invalid row.

    Attributes:
        row: number from 1; in JSON lines, the number of the line.
        column: name of the column; empty if the row as a whole cannot be read.
        reason: what is wrong with it.
    """

    row: int
    column: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{self.column and f', column {self.column}'}: {self.reason}"


class LazyExamples(Sequence[Example]):
    """Sequence of examples that are decoded or generated on access."""

    @abstractmethod
    def load(self, index: int) -> Example:
        """Return the example of an index, negative ones included."""

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.load(i) for i in range(len(self))[index]]
        return self.load(index)


class ExampleFile(LazyExamples):
    """The valid rows of a file, decoded on access.

    Holds no open file, so that it can be pickled for the worker processes of a data loader.

    Attributes:
        path: the file.
        num_rows: number of rows that were validated.
        num_targets: number of targets of each valid row.
        question_types: question type of each valid row.
        problems: the invalid rows, which are skipped.
        ignored_columns: columns of the file that are not read.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        max_examples: int | None = None,
        *,
        inspect: Callable[[Example], None] | None = None,
    ) -> None:
        """Open a file and validate every row, which decodes each image once.

        Args:
            path: a ``.parquet`` or ``.jsonl`` file.
            max_examples: stop after this number of valid rows.
            inspect: called with each valid example, in order, while the file is opened.

        Raises:
            ValueError: the suffix is not supported.
            FileNotFoundError: the file does not exist.
            ArtifactError: the file does not match its suffix, or a column is missing.
            NoValidRowError: no row is valid.
            MissingDependencyError: the file is Parquet and pyarrow is not installed.
        """
        self.path = Path(path)
        self._rows = open_rows(self.path)
        self._valid: list[int] = []
        self.num_rows = 0
        num_targets: list[int] = []
        question_types: list[str] = []
        problems: list[RowProblem] = []
        for index in range(len(self._rows)):
            if len(self._valid) == max_examples:
                break
            self.num_rows += 1
            try:
                example = example_from_row(self._rows.read(index), self.path.parent)
            except FieldError as error:
                problems.append(self._problem(index, error))
            else:
                self._valid.append(index)
                num_targets.append(len(example.masks))
                question_types.append(example.question_type)
                if inspect is not None:
                    inspect(example)
        self.num_targets, self.question_types = tuple(num_targets), tuple(question_types)
        self.problems = tuple(problems)
        self.ignored_columns = tuple(self._rows.ignored_columns)
        if not self._valid:
            raise NoValidRowError(f"{self.summary()}; at least one row must be valid")
        if problems or self.ignored_columns:
            warnings.warn(self.summary(), stacklevel=2)

    def __len__(self) -> int:
        return len(self._valid)

    def load(self, index: int) -> Example:
        """Decode a valid row; ArtifactError if the file has changed."""
        row = self._valid[index]
        try:
            return example_from_row(self._rows.read(row), self.path.parent)
        except FieldError as error:
            raise ArtifactError(
                f"{self.path} changed after it was opened: {self._problem(row, error)}"
            ) from error

    def summary(self) -> str:
        """Return one line: invalid rows with the first reasons, and ignored columns."""
        if not self.num_rows:
            return f"{self.path} has no rows"
        text = f"{self.path}: all {len(self)} rows are valid"
        if self.problems:
            text = (
                f"{self.path}: {len(self.problems)} of {self.num_rows} rows are invalid and "
                f"skipped: {_first_of([str(problem) for problem in self.problems])}"
            )
        if self.ignored_columns:
            text += f"; ignored columns: {_first_of([*map(_with_hint, self.ignored_columns)])}"
        return text

    def to_json(self) -> dict[str, Any]:
        """Return path, number of rows, all skipped rows and ignored columns."""
        return {
            "path": str(self.path),
            "num_rows": self.num_rows,
            "skipped_rows": [asdict(problem) for problem in self.problems],
            "ignored_columns": list(self.ignored_columns),
        }

    def _problem(self, index: int, error: FieldError) -> RowProblem:
        return RowProblem(self._rows.numbers[index], error.field, str(error))


def _first_of(items: Sequence[str]) -> str:
    """Join the first items, and count the others."""
    more = [f"and {len(items) - REPORTED} more"] if len(items) > REPORTED else []
    return "; ".join([*items[:REPORTED], *more])


def _with_hint(column: str) -> str:
    nearest = difflib.get_close_matches(column, COLUMNS, n=1, cutoff=0.8)
    return f"{column} (did you mean {nearest[0]}?)" if nearest else column


def example_from_row(row: Mapping[str, Any], directory: Path) -> Example:
    """Decode a row of an example file.

    Args:
        row: values by column, as JSON or pyarrow gives them; a missing column is no key.
        directory: directory that image paths are relative to.

    Raises:
        FieldError: a column is missing or its value is not accepted.
    """
    identifier = row.get("id")
    if type(identifier) is int:
        identifier = str(identifier)
    texts: dict[str, Any] = {"id": identifier, "instruction": row.get("instruction")}
    texts |= {name: row.get(name, "") for name in ("response", "question_type", "source")}
    for name, text in texts.items():
        if not isinstance(text, str):
            found = "missing or null" if text is None else json_type(text)
            accepted = "text or an integer" if name == "id" else "text"
            raise FieldError(name, f"{name} is {found}; accepted: {accepted}")
    segmentations = row.get("masks")
    if isinstance(segmentations, Mapping):
        segmentations = _rows_of_columns(segmentations)
    if not isinstance(segmentations, list):
        found = "missing or null" if segmentations is None else json_type(segmentations)
        raise FieldError(
            "masks",
            f"masks is {found}; accepted: a list with one COCO segmentation per target, [] if "
            "nothing matches",
        )
    column, source = _image_source(row, directory)
    image = _load(source, column)
    height, width = image.shape[:2]
    decoded = []
    for number, segmentation in enumerate(segmentations, start=1):
        try:
            decoded.append(decode_mask(segmentation, height, width))
        except ValueError as error:
            hint = _orientation_hint(source)
            raise FieldError("masks", f"mask {number}: {error}{hint}") from error
    masks = np.stack(decoded) if decoded else np.zeros((0, height, width), dtype=np.bool_)
    return Example(image=image, masks=masks, **texts)


def _rows_of_columns(columns: Mapping[str, Any]) -> object:
    """Return the rows of a ``Sequence`` of RLE, which Hugging Face datasets store by column."""
    sizes, counts = columns.get("size"), columns.get("counts")
    if not (isinstance(sizes, list) and isinstance(counts, list) and len(sizes) == len(counts)):
        return columns
    if not all(isinstance(size, list) for size in sizes):
        return columns
    return [{"size": size, "counts": each} for size, each in zip(sizes, counts, strict=True)]


def _image_source(row: Mapping[str, Any], directory: Path) -> tuple[str, bytes | Path]:
    """Return the column of a row's image, and its bytes or path."""
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


def _load(source: bytes | Path, column: str) -> RgbArray:
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


def _orientation_hint(source: bytes | Path) -> str:
    """Return the frame of the masks if the image has an EXIF orientation."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation not in range(2, 9):
            return ""
        return (
            f"; the image is stored as [{image.height}, {image.width}] with the EXIF orientation "
            f"{orientation}, and masks are in the frame of the upright image, as viewers show it"
        )


def write_examples(path: str | PathLike[str], examples: Iterable[Example]) -> int:
    """Write examples to a file atomically.

    Args:
        path: a ``.parquet`` or ``.jsonl`` file; an existing file is replaced.
        examples: the examples, consumed one at a time.

    Returns:
        The number of rows written.

    Raises:
        ValueError: the suffix is not supported.
        MissingDependencyError: the file is Parquet and pyarrow is not installed.
    """
    target = Path(path)
    count = 0
    with atomic_write(target) as partial, row_writer(partial, target.suffix) as write:
        for example in examples:
            count += 1
            png = io.BytesIO()
            Image.fromarray(example.image).save(png, "PNG", compress_level=3)
            write(
                ExampleRow(
                    id=example.id,
                    instruction=example.instruction,
                    masks=[encode_mask(mask) for mask in example.masks],
                    image=png.getvalue(),
                    response=example.response,
                    question_type=example.question_type,
                    source=example.source,
                )
            )
    return count
