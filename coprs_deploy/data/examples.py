"""Examples (image, instruction, ground-truth masks, response) and the files that hold them.

Every source of examples is a ``Sequence[Example]``: generated scenes, and the files that are read
here. A file is Parquet (``.parquet``) or JSON lines (``.jsonl``), with the same columns:

    id, instruction                    text
    response, question_type, source    text, optional
    image or image_path                bytes of an image file (base64 in JSON), or its path relative
                                       to the example file
    masks                              COCO RLE, {"size": [height, width], "counts": text}

Opening a file validates every row. Invalid rows are skipped and reported with their number and the
reason. :mod:`coprs_deploy.data.rows` reads and writes the rows on disk.
"""

from __future__ import annotations

import io
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.data.rle import decode_mask, encode_mask
from coprs_deploy.data.rows import ExampleRow, open_rows, row_writer
from coprs_deploy.errors import ArtifactError
from coprs_deploy.images import RgbArray, load_image
from coprs_deploy.prompts import REFERENCE_TOKEN, check_instruction

REPORTED_PROBLEMS = 5
"""Invalid rows listed in a warning; ``ExampleFile.problems`` has all of them."""


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
        ValueError: a shape or dtype is wrong, a mask is empty, the instruction is blank, or the
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
        check_instruction(self.instruction)
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f"image is {self.image.dtype} {self.image.shape}; accepted: uint8 (H, W, 3)"
            )
        height, width = self.image.shape[:2]
        if self.masks.dtype != np.bool_ or self.masks.shape[1:] != (height, width):
            raise ValueError(
                f"masks are {self.masks.dtype} {self.masks.shape}; accepted: bool "
                f"(N, {height}, {width}), the size of the image"
            )
        for number, mask in enumerate(self.masks, start=1):
            if not mask.any():
                raise ValueError(
                    f"mask {number} is empty; leave out a target that is not visible, or write a "
                    "no-match example without masks"
                )
        references = self.response.count(REFERENCE_TOKEN)
        if self.response and references != len(self.masks):
            raise ValueError(
                f"the response holds {references} {REFERENCE_TOKEN} for {len(self.masks)} masks; "
                "it must hold one for each"
            )


@dataclass(frozen=True)
class RowProblem:
    """An invalid row: its number, counted from 1, and the reason."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


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
        problems: the invalid rows, which are skipped.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        strict: bool = False,
        inspect: Callable[[Example], None] | None = None,
    ) -> None:
        """Open a file and validate every row, which decodes each image once.

        Args:
            path: a ``.parquet`` or ``.jsonl`` file.
            strict: raise if any row is invalid.
            inspect: called with each valid example, in order, while the file is opened.

        Raises:
            ValueError: the suffix is not supported.
            FileNotFoundError: the file does not exist.
            ArtifactError: the file does not match its suffix, its columns are wrong, or ``strict``
                is set and a row is invalid.
            MissingDependencyError: the file is Parquet and pyarrow is not installed.
        """
        self.path = Path(path)
        self._rows = open_rows(self.path)
        self._valid: list[int] = []
        problems: list[RowProblem] = []
        for index in range(len(self._rows)):
            try:
                example = self._decode(index)
                self._valid.append(index)
            except (ValueError, FileNotFoundError) as error:
                problems.append(RowProblem(index + 1, str(error)))
            else:
                if inspect is not None:
                    inspect(example)
        self.problems = tuple(problems)
        if problems and strict:
            raise ArtifactError(f"{self.summary()}: correct them, or open the file without strict")
        if problems:
            warnings.warn(self.summary(), stacklevel=2)

    def __len__(self) -> int:
        return len(self._valid)

    def load(self, index: int) -> Example:
        """Decode a valid row; ArtifactError if the file has changed."""
        row = self._valid[index]
        try:
            return self._decode(row)
        except (ValueError, FileNotFoundError) as error:
            raise ArtifactError(
                f"{self.path} changed after it was opened: {RowProblem(row + 1, str(error))}"
            ) from error

    def summary(self) -> str:
        """Return one line with the number of invalid rows and the first reasons."""
        if not self.problems:
            return f"{self.path}: all {len(self)} rows are valid"
        named = "; ".join(map(str, self.problems[:REPORTED_PROBLEMS]))
        more = len(self.problems) - REPORTED_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        return (
            f"{self.path}: {len(self.problems)} of {len(self._rows)} rows are invalid and skipped: "
            f"{named}{rest}"
        )

    def _decode(self, index: int) -> Example:
        """Decode a row; every problem is a ValueError or a FileNotFoundError."""
        row = self._rows.read(index)
        if (row.image is None) == (row.image_path is None):
            raise ValueError("the row must have exactly one of image and image_path")
        if row.image is not None:
            image = load_image(row.image)
        else:
            path = self.path.parent / str(row.image_path)
            if not path.is_file():
                raise FileNotFoundError(f"the image file {path} does not exist")
            image = load_image(path)
        height, width = image.shape[:2]
        masks = np.zeros((len(row.masks), height, width), dtype=np.bool_)
        for number, encoded in enumerate(row.masks):
            if encoded.size != (height, width):
                raise ValueError(
                    f"mask {number + 1} is {encoded.size[0]} x {encoded.size[1]}, but the image is "
                    f"{height} x {width} (height x width)"
                )
            try:
                masks[number] = decode_mask(encoded)
            except ValueError as error:
                raise ValueError(f"mask {number + 1}: {error}") from error
        return Example(
            row.id,
            image,
            row.instruction,
            masks,
            response=row.response,
            question_type=row.question_type,
            source=row.source,
        )


def write_examples(
    path: str | PathLike[str], examples: Iterable[Example], *, images_as_files: bool = False
) -> int:
    """Write examples to a file atomically.

    Args:
        path: a ``.parquet`` or ``.jsonl`` file; an existing file is replaced.
        examples: the examples, consumed one at a time.
        images_as_files: write PNG files into a directory named after the file (``x_images`` for
            ``x.jsonl``) instead of storing the bytes in the rows.

    Returns:
        The number of rows written.

    Raises:
        ValueError: the suffix is not supported.
        MissingDependencyError: the file is Parquet and pyarrow is not installed.
    """
    target = Path(path)
    directory = target.with_name(f"{target.stem}_images") if images_as_files else None
    if directory:
        directory.mkdir(exist_ok=True)
    count = 0
    with atomic_write(target) as partial, row_writer(partial, target.suffix) as write:
        for example in examples:
            count += 1
            png, image_path = _png_bytes(example.image), None
            if directory:
                image_path = f"{directory.name}/{count:06d}.png"
                (directory.parent / image_path).write_bytes(png)
            write(
                ExampleRow(
                    id=example.id,
                    instruction=example.instruction,
                    masks=[encode_mask(mask) for mask in example.masks],
                    image=None if image_path else png,
                    image_path=image_path,
                    response=example.response,
                    question_type=example.question_type,
                    source=example.source,
                )
            )
    return count


def _png_bytes(image: RgbArray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
