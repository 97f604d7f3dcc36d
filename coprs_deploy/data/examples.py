"""Examples (image, instruction, ground-truth masks, response) and the files that hold them.

Every source of examples is a ``Sequence[Example]``: generated scenes, the data sets of
:mod:`coprs_deploy.data.readers`, and the example files that are read here. A file is Parquet
(``.parquet``) or JSON lines (``.jsonl``, UTF-8), with the same columns:

    id                             text or integer
    instruction                    text
    masks                          list with one COCO segmentation per target: RLE,
                                   {"size": [height, width], "counts": text, bytes or integers}, or
                                   polygons, [[x1, y1, x2, y2, ...], ...]; [] if nothing matches;
                                   or the Sequence of RLE of Hugging Face datasets
    image or image_path            bytes of an image file (base64 in JSON), or the image of Hugging
                                   Face datasets, {"bytes": ..., "path": ...}; or the path of an
                                   image file, relative to the example file
    ignore_mask                    COCO segmentation of the pixels that no loss, reward or metric
                                   counts, optional
    response, question_type,       text, optional
    source

Masks are in the frame of the upright image: a file with an EXIF orientation is turned first, as by
viewers, annotation tools in a browser, OpenCV and detectron2, but not by ``PIL.Image.open`` alone.

Opening a file validates every row. Invalid rows are skipped and reported with row, column and
reason; a file without a valid row is an error. Other columns are ignored and named.
:mod:`coprs_deploy.data.rows` reads and writes the rows on disk.
"""

from __future__ import annotations

import difflib
import io
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.data.image_checks import ImageLoader, map_in_order
from coprs_deploy.data.image_columns import (
    image_source,
    load_image_source,
    orientation_hint,
    row_image_name,
)
from coprs_deploy.data.rle import decode_mask, encode_mask, json_type
from coprs_deploy.data.rows import COLUMNS, ExampleRow, FieldError, open_rows, row_writer
from coprs_deploy.errors import ArtifactError, NoValidRowError
from coprs_deploy.images import RgbArray
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
        ignore_mask: (H, W) bool, True for pixels that count neither as hit nor as miss; None for
            none.

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
    ignore_mask: NDArray[np.bool_] | None = None

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
        ignored = self.ignore_mask
        if ignored is not None and (ignored.dtype != np.bool_ or ignored.shape != (height, width)):
            raise FieldError(
                "ignore_mask",
                f"ignore_mask is {ignored.dtype} {ignored.shape}; accepted: bool "
                f"({height}, {width}), the size of the image",
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


class ExampleSource(LazyExamples):
    """Examples on disk, of which images and masks are decoded on access.

    Attributes:
        description: name of the source, for reports and errors.
        num_rows: number of rows of the source, invalid ones included.
        num_targets: number of targets of each example.
        question_types: question type of each example.
        problems: the invalid rows, which are skipped.
        files: files with instructions and annotations, without those of images.
        has_references: whether the instructions are referring expressions of REFER.
        has_no_match: whether an example without a mask is a no-match example; else it has a
            target whose annotation is empty.
    """

    description: str
    num_rows: int
    num_targets: Sequence[int]
    question_types: Sequence[str]
    problems: tuple[RowProblem, ...] = ()
    files: Sequence[Path] = ()
    has_references: bool = False
    has_no_match: bool = True

    @abstractmethod
    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode the example of an index from 0; FieldError if a part of it is invalid.

        ``load`` decodes the image.
        """

    @abstractmethod
    def image_file(self, index: int) -> bytes | Path:
        """Return the image file of an example: its bytes, or its path."""

    @abstractmethod
    def image_name(self, index: int) -> str:
        """Return a name that all examples on one image share, in every source of that image."""

    def num_same_class(self, index: int) -> int | None:
        """Return the number of other objects of the targets' categories in the image, if known."""
        return None

    def __len__(self) -> int:
        return len(self.num_targets)

    def load(self, index: int) -> Example:
        """Decode the example of an index; ArtifactError if a part of it is invalid."""
        position = range(len(self))[index]
        try:
            return self.read(position)
        except FieldError as error:
            raise ArtifactError(
                f"{self.description}, example {position + 1}, {error.field}: {error}"
            ) from error

    def summary(self) -> str:
        """Return one line: the number of rows, and invalid ones with the first reasons."""
        if not self.problems:
            return f"{self.description}: all {len(self)} rows are valid"
        return (
            f"{self.description}: {len(self.problems)} of {self.num_rows} rows are invalid and "
            f"skipped: {_first_of([str(problem) for problem in self.problems])}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the number of rows and all skipped rows."""
        return {
            "num_rows": self.num_rows,
            "skipped_rows": [asdict(problem) for problem in self.problems],
        }


class ExampleFile(ExampleSource):
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
        load: ImageLoader = load_image_source,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Open a file and validate every row, which decodes each image, in threads.

        Args:
            path: a ``.parquet`` or ``.jsonl`` file.
            max_examples: stop after this number of valid rows.
            inspect: called with each valid example, in order, while the file is opened.
            load: decodes the image of a row for the validation and for ``inspect``.
            on_progress: called with the numbers of rows that are validated and in the file.

        Raises:
            ValueError: the suffix is not supported.
            FileNotFoundError: the file does not exist.
            ArtifactError: the file does not match its suffix, or a column is missing.
            NoValidRowError: no row is valid.
            MissingDependencyError: the file is Parquet and pyarrow is not installed.
        """
        self.path = Path(path)
        self.files = (self.path,)
        self.description = str(self.path)
        self._rows = open_rows(self.path)
        self._valid: list[int] = []
        self.num_rows = 0
        num_targets: list[int] = []
        question_types: list[str] = []
        problems: list[RowProblem] = []
        for index, found in enumerate(map_in_order(self._validation(load), self._each_row())):
            if len(self._valid) == max_examples:
                break
            self.num_rows += 1
            if isinstance(found, FieldError):
                problems.append(self._problem(index, found))
            else:
                self._valid.append(index)
                num_targets.append(len(found.masks))
                question_types.append(found.question_type)
                if inspect is not None:
                    inspect(found)
            if on_progress is not None:
                on_progress(self.num_rows, len(self._rows))
        self.num_targets, self.question_types = tuple(num_targets), tuple(question_types)
        self.problems = tuple(problems)
        self.ignored_columns = tuple(self._rows.ignored_columns)
        if not self._valid:
            raise NoValidRowError(f"{self.summary()}; at least one row must be valid")
        if problems or self.ignored_columns:
            warnings.warn(self.summary(), stacklevel=2)

    def _each_row(self) -> Iterator[Mapping[str, Any] | FieldError]:
        for index in range(len(self._rows)):
            try:
                yield self._rows.read(index)
            except FieldError as error:
                yield error

    def _validation(
        self, load: ImageLoader
    ) -> Callable[[Mapping[str, Any] | FieldError], Example | FieldError]:
        def validate(row: Mapping[str, Any] | FieldError) -> Example | FieldError:
            try:
                return row if isinstance(row, FieldError) else self._example(row, load)
            except FieldError as error:
                return error

        return validate

    def _example(self, row: Mapping[str, Any], load: ImageLoader) -> Example:
        return example_from_row(row, self.path.parent, load)

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode a valid row; FieldError if the file has changed."""
        return self._example(self._rows.read(self._valid[index]), load)

    def load(self, index: int) -> Example:
        """Decode a valid row; ArtifactError if the file has changed."""
        position = range(len(self))[index]
        try:
            return self.read(position)
        except FieldError as error:
            problem = self._problem(self._valid[position], error)
            raise ArtifactError(f"{self.path} changed after it was opened: {problem}") from error

    def image_file(self, index: int) -> bytes | Path:
        """Return the image file of a row: its bytes, or its path."""
        return image_source(self._rows.read(self._valid[index]), self.path.parent)[1]

    def image_name(self, index: int) -> str:
        """Return the name of a row's image from its path, or a hash of its bytes."""
        return row_image_name(self._rows.read(self._valid[index]))

    def summary(self) -> str:
        """Return one line: invalid rows with the first reasons, and ignored columns."""
        if not self.num_rows:
            return f"{self.path} has no rows"
        text = super().summary()
        if self.ignored_columns:
            text += f"; {self.describe_ignored()}"
        return text

    def describe_ignored(self) -> str:
        """Name the ignored columns, with the column that one may mean."""
        return f"ignored columns: {_first_of([*map(_with_hint, self.ignored_columns)])}"

    def to_json(self) -> dict[str, Any]:
        """Return path, number of rows, all skipped rows and ignored columns."""
        return {
            "path": str(self.path),
            **super().to_json(),
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


def example_from_row(
    row: Mapping[str, Any], directory: Path, load: ImageLoader = load_image_source
) -> Example:
    """Decode a row of an example file.

    Args:
        row: values by column, as JSON or pyarrow gives them; a missing column is no key.
        directory: directory that image paths are relative to.
        load: decodes the image.

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
    column, source = image_source(row, directory)
    image = load(source, column)
    height, width = image.shape[:2]
    decoded = []
    for number, segmentation in enumerate(segmentations, start=1):
        try:
            decoded.append(decode_mask(segmentation, height, width))
        except ValueError as error:
            hint = orientation_hint(source)
            raise FieldError("masks", f"mask {number}: {error}{hint}") from error
    masks = np.stack(decoded) if decoded else np.zeros((0, height, width), dtype=np.bool_)
    ignore_mask = None
    if row.get("ignore_mask") is not None:
        try:
            ignore_mask = decode_mask(row["ignore_mask"], height, width)
        except ValueError as error:
            raise FieldError("ignore_mask", f"ignore_mask: {error}") from error
    return Example(image=image, masks=masks, ignore_mask=ignore_mask, **texts)


def _rows_of_columns(columns: Mapping[str, Any]) -> object:
    """Return the rows of a ``Sequence`` of RLE, which Hugging Face datasets store by column."""
    sizes, counts = columns.get("size"), columns.get("counts")
    if not (isinstance(sizes, list) and isinstance(counts, list) and len(sizes) == len(counts)):
        return columns
    if not all(isinstance(size, list) for size in sizes):
        return columns
    return [{"size": size, "counts": each} for size, each in zip(sizes, counts, strict=True)]


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
            write(row_of_example(example, png.getvalue()))
    return count


def row_of_example(
    example: Example, image: bytes | None = None, image_path: str | None = None
) -> ExampleRow:
    """Encode an example as a row with the bytes of its image file, or with its path."""
    ignored = example.ignore_mask
    return ExampleRow(
        id=example.id,
        instruction=example.instruction,
        masks=[encode_mask(mask) for mask in example.masks],
        image=image,
        image_path=image_path,
        response=example.response,
        question_type=example.question_type,
        source=example.source,
        ignore_mask=None if ignored is None else encode_mask(ignored),
    )
