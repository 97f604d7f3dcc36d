"""Referring segmentation in the forms of Hugging Face data sets.

:class:`ReferenceRows` reads ``jxu124/refcoco`` and its siblings: one reference a row, with the
segmentation as JSON text and the image as a path. :class:`MaskRows` reads rows with an image and
one mask of its size: the evaluation files of Seg-Zero and VisionReasoner (Parquet), and the folders
that the public CoPRS code saves (``save_to_disk``).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.examples import Example, ExampleSource, RowProblem
from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import image_name_of, image_source, load_image_source
from coprs_deploy.data.readers.arrow import ArrowRows
from coprs_deploy.data.readers.images import ImageFiles
from coprs_deploy.data.readers.instances import ImageRecord, check_size, stack_masks
from coprs_deploy.data.readers.refer import IMAGE_FOLDERS
from coprs_deploy.data.rle import decode_segmentation
from coprs_deploy.data.rows import FieldError
from coprs_deploy.errors import ArtifactError

REFERENCE_COLUMNS = ("raw_anns", "raw_image_info", "sentences", "ref_id")
MASK_COLUMNS = ("image", "mask", "text")
BOX_COLUMNS = ("problem", "solution")
"""Columns that tell the forms apart; the last form has boxes and points instead of masks."""

NO_MASKS = (
    "this is a training set of Seg-Zero: its column solution has boxes and points, not masks, and "
    "training of CoPRS needs masks; take the references from RefCOCOg instead"
)

_NAMES = ("image_filename", "image_id", "ann_id")


class _Sentence(msgspec.Struct, gc=False):
    sent: str
    sent_id: int = -1


class _Annotation(msgspec.Struct):
    segmentation: Any


class ReferenceRows(ExampleSource):
    """Sentences of ``jxu124/refcoco``, ``refcocoplus`` or ``refcocog``.

    Attributes:
        num_refs: number of rows of the files, one a reference.
        images: the image files.
    """

    has_references = True
    has_no_match = False

    def __init__(
        self,
        paths: Sequence[Path],
        description: str,
        *,
        first_sentences: bool = False,
        root: Path | None = None,
        image_folder: Path | None = None,
    ) -> None:
        """Open Parquet files.

        Args:
            paths: the files of a split.
            description: name of the source.
            first_sentences: use only the first sentence of each reference.
            root: folder that contains the folder of the images; None takes that of the files.
            image_folder: folder of the images; None looks below ``root``.

        Raises:
            ArtifactError: a file cannot be read.
        """
        self.description, self.files = description, paths
        self._rows = ArrowRows(paths)
        self.num_refs = len(self._rows)
        self._row_of_sentence, self._sent_ids = array("q"), array("q")
        self._sentences: list[str] = []
        self._records: list[ImageRecord | None] = []
        problems, self.num_rows = [], 0
        columns = (self._rows.column(name) for name in ("raw_image_info", "sentences"))
        for row, (record, sentences) in enumerate(zip(*columns, strict=True)):
            try:
                decoded = _decode(record, ImageRecord, "raw_image_info")
                texts = _convert_sentences(sentences)[: 1 if first_sentences else None]
            except FieldError as error:
                self._records.append(None)
                problems.append(RowProblem(row + 1, error.field, str(error)))
                self.num_rows += 1
                continue
            self._records.append(decoded)
            self.num_rows += len(texts)
            for sentence in texts:
                self._row_of_sentence.append(row)
                self._sent_ids.append(sentence.sent_id)
                self._sentences.append(sentence.sent)
        self._ref_ids = self._rows.column("ref_id")
        self.num_targets = array("i", [1]) * len(self._sentences)
        self.question_types = [""] * len(self._sentences)
        self.problems = tuple(problems)
        names = {record.file_name for record in self._records if record is not None}
        roots = [root] if root else [paths[0].parent, paths[0].parent.parent]
        folders = [each / folder for each in roots for folder in IMAGE_FOLDERS]
        self.images = ImageFiles(names, [image_folder] if image_folder else folders)

    def _record(self, index: int) -> ImageRecord:
        record = self._records[self._row_of_sentence[index]]
        assert record is not None
        return record

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode image and mask of a sentence; FieldError if one of them is invalid."""
        row, record = self._row_of_sentence[index], self._record(index)
        image = self.images.load(record.file_name, load)
        check_size(record, image, self.images.path(record.file_name))
        text = self._rows.scalars(row, ("raw_anns",)).get("raw_anns")
        annotation = _decode(text.as_py() if text else None, _Annotation, "raw_anns")
        try:
            mask = decode_segmentation(annotation.segmentation, record.height, record.width)
        except ValueError as error:
            raise FieldError("raw_anns", str(error)) from error
        return Example(
            id=f"{self._ref_ids[row]}-{self._sent_ids[index]}",
            image=image,
            instruction=self._sentences[index],
            masks=stack_masks([mask], image.shape[:2]),
            source=self.description,
        )

    def image_file(self, index: int) -> Path:
        """Return the path of the image of a sentence."""
        return self.images.path(self._record(index).file_name)

    def image_name(self, index: int) -> str:
        """Return the number of the image in COCO."""
        return image_name_of(PurePath(self._record(index).file_name))


class MaskRows(ExampleSource):
    """Rows with an image, a text or several, and one mask of the size of the image."""

    def __init__(
        self,
        paths: Sequence[Path],
        description: str,
        *,
        first_sentences: bool = False,
    ) -> None:
        """Open Parquet files, or the Arrow files of a saved data set.

        Args:
            paths: the files of a split.
            description: name of the source.
            first_sentences: use only the first text of each row.

        Raises:
            ArtifactError: a file cannot be read.
        """
        self.description, self.files = description, paths
        self._rows = ArrowRows(paths)
        self._folder = paths[0].parent
        self._row_of_text, self._number_of_text = array("q"), array("q")
        self._texts: list[str] = []
        problems, self.num_rows = [], 0
        for row, texts in enumerate(self._rows.column("text")):
            listed = texts if isinstance(texts, list) else [texts]
            if first_sentences:
                listed = listed[:1]
            self.num_rows += len(listed)
            for number, text in enumerate(listed):
                if not isinstance(text, str) or not text.strip():
                    problems.append(RowProblem(row + 1, "text", f"text is {text!r}"))
                    continue
                self._row_of_text.append(row)
                self._number_of_text.append(number)
                self._texts.append(text)
        self._names = {
            name: self._rows.column(name) for name in _NAMES if name in self._rows.columns
        }
        has_target = {row: self._has_target(row) for row in sorted(set(self._row_of_text))}
        self.num_targets = array("i", (has_target[row] for row in self._row_of_text))
        self.question_types = [""] * len(self._texts)
        self.problems = tuple(problems)

    def _has_target(self, row: int) -> bool:
        """Whether a row has a target, from its mask alone."""
        try:
            return bool(_mask(self._rows.scalars(row, ("mask",))).any())
        except FieldError:  # reported when the row is read
            return True

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode image and mask of a text; FieldError if one of them is invalid."""
        row = self._row_of_text[index]
        scalars = self._rows.scalars(row, ("image", "mask"))
        image = load(self._image_source(scalars), "image")
        mask = _mask(scalars)
        if mask.shape != image.shape[:2]:
            height, width = image.shape[:2]
            raise FieldError(
                "mask", f"mask is {mask.shape}, but the image is ({height}, {width}), height first"
            )
        ids = [
            str(self._names[name][row]) for name in ("image_id", "ann_id") if name in self._names
        ]
        return Example(
            id="-".join([*ids, f"{row + 1}.{self._number_of_text[index]}"]),
            image=image,
            instruction=self._texts[index],
            masks=stack_masks([mask], mask.shape),
            source=self.description,
        )

    def _image_source(self, scalars: Mapping[str, Any]) -> bytes | Path:
        row = {"image": scalars["image"].as_py()} if "image" in scalars else {}
        return image_source(row, self._folder)[1]

    def image_file(self, index: int) -> bytes | Path:
        """Return the image file of a text: its bytes, or its path."""
        return self._image_source(self._rows.scalars(self._row_of_text[index], ("image",)))

    def image_name(self, index: int) -> str:
        """Return the name of the image from its file name, its number, or a hash of its bytes."""
        row = self._row_of_text[index]
        for name in ("image_filename", "image_id"):
            value = self._names.get(name, {row: None})[row]
            if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
                value = f"{int(value):012d}"  # a number of COCO
            if value:
                return image_name_of(PurePath(str(value)))
        scalar = self._rows.scalars(row, ("image",)).get("image")
        image = scalar.as_py() if scalar is not None else None
        if isinstance(image, Mapping) and image.get("path"):
            return image_name_of(PurePath(image["path"]))
        return image_name_of(self.image_file(index))


def open_rows_of_hub(
    paths: Sequence[Path], description: str, *, first_sentences: bool, **folders: Path | None
) -> ReferenceRows | MaskRows:
    """Open files by the columns that they have.

    Args:
        paths: the files of a split.
        description: name of the source.
        first_sentences: use only the first sentence of each reference or row.
        folders: ``root`` and ``image_folder`` of :class:`ReferenceRows`.

    Raises:
        ArtifactError: the columns are of no known form.
    """
    columns = ArrowRows(paths).columns
    if set(REFERENCE_COLUMNS) <= set(columns):
        return ReferenceRows(paths, description, first_sentences=first_sentences, **folders)
    if set(MASK_COLUMNS) <= set(columns):
        return MaskRows(paths, description, first_sentences=first_sentences)
    if set(BOX_COLUMNS) <= set(columns):
        raise ArtifactError(f"{paths[0]}: {NO_MASKS}")
    forms = " or ".join(f"{', '.join(form)}" for form in (REFERENCE_COLUMNS, MASK_COLUMNS))
    raise ArtifactError(
        f"{paths[0]} has the columns {', '.join(columns)}; accepted: {forms}, or an example file "
        "(id, instruction, masks, image or image_path)"
    )


def _decode(text: object, kind: Any, column: str) -> Any:
    """Decode JSON text of a column; FieldError if it has another form."""
    try:
        return msgspec.json.decode(text if isinstance(text, str) else "null", type=kind)
    except msgspec.DecodeError as error:
        raise FieldError(
            column, f"{column} is not the JSON text of {kind.__name__}: {error}"
        ) from error


def _convert_sentences(sentences: object) -> list[_Sentence]:
    try:
        found = msgspec.convert(sentences, list[_Sentence])
    except msgspec.ValidationError as error:
        raise FieldError("sentences", f"sentences have another form: {error}") from error
    if not any(sentence.sent.strip() for sentence in found):
        raise FieldError("sentences", "there is no sentence")
    return [sentence for sentence in found if sentence.sent.strip()]


def _mask(scalars: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Decode the column of a mask, rows of booleans or numbers; FieldError for another form."""
    scalar = scalars.get("mask")
    if scalar is None:
        raise FieldError("mask", "mask is missing or null; accepted: rows of booleans")
    rows: Any = getattr(scalar, "value", scalar)  # the value of an extension type
    rows = getattr(rows, "values", rows)
    if not hasattr(rows, "value_lengths"):
        raise FieldError("mask", f"mask is {rows.type}; accepted: rows of booleans")
    widths = set(rows.value_lengths().to_pylist())
    if len(widths) != 1 or None in widths:
        raise FieldError("mask", f"mask has rows of {len(widths)} lengths; accepted: one length")
    pixels = rows.flatten().to_numpy(zero_copy_only=False)
    if pixels.dtype.kind not in "biuf":
        raise FieldError("mask", f"mask is rows of {rows.type.value_type}; accepted: booleans")
    mask: NDArray[np.bool_] = pixels.reshape(len(rows), -1) != 0
    return mask
