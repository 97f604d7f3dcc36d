"""Rows of an evaluation: what was predicted for each example, and its pixel counts.

A finished evaluation has them in ``DIR/DATASET/rows.jsonl``, one JSON object a line, in the order
of the source. No row contains a duration, so that a resumed evaluation writes the same file.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from coprs_deploy.data.rle import Rle
from coprs_deploy.errors import ArtifactError
from coprs_deploy.specs import Record

ROWS_FILE = "rows.jsonl"


class MaskCounts(Record, frozen=True):
    """Pixel counts of a predicted mask and a ground-truth mask.

    Attributes:
        intersection: pixels in both masks.
        union: pixels in at least one of them.
        prediction: pixels of the predicted mask.
        ground_truth: pixels of the ground-truth mask.
    """

    intersection: int
    union: int
    prediction: int
    ground_truth: int


class EvaluationRow(Record, frozen=True, kw_only=True):
    """One evaluated example; all targets together count as one mask.

    The counts are those of the protocol, which decides about ignored pixels. A failed row has an
    ``error``, no masks, and ``num_found`` 0. Its IoU is 0 in every mean, and its counts are those
    of an empty prediction, so that the cIoU has its ground truth; they are None if that could
    not be decoded either.

    Attributes:
        index: position in the source, from 0.
        id: id of the example; empty if it could not be decoded.
        image: name that all rows on one image share; empty if the source names no images.
        image_size: height and width; None if the image could not be decoded.
        instruction: the user's text as the model got it.
        question_type: type of the question, for metrics by type; may be empty.
        source: data set or preset that the example comes from; may be empty.
        num_targets: number of annotated targets, 0 for a no-match example. A target whose
            annotation is empty, as REFER has some, counts as one.
        num_found: number of predicted masks; 0 for a no-match prediction.
        mask: counts of the predicted masks against the targets.
        prior: counts of the priors, thresholded at logit 0, against the targets.
        num_same_class: number of other objects of the targets' categories in the image; None if
            unknown.
        masks: predicted masks at the size of the image, in the order of the response.
        scores: confidence of each mask in [0, 1].
        response: the whole generated text.
        stop_reason: why the response ended, as in ``SegmentationResult``.
        error: None, or what went wrong, as in ``PolicyError: out of memory``.
        extra: further metrics of this example, by name.
    """

    index: int
    id: str
    image: str = ""
    image_size: tuple[int, int] | None = None
    instruction: str = ""
    question_type: str = ""
    source: str = ""
    num_targets: int
    num_found: int
    mask: MaskCounts | None
    prior: MaskCounts | None
    num_same_class: int | None = None
    masks: tuple[Rle, ...] = ()
    scores: tuple[float, ...] = ()
    response: str = ""
    stop_reason: str = ""
    error: str | None = None
    extra: dict[str, float] = {}


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(EvaluationRow)


def encode_row(row: EvaluationRow) -> bytes:
    """Return a row as one line of JSON."""
    return _ENCODER.encode(row) + b"\n"


def decode_row(line: bytes) -> EvaluationRow:
    """Decode a line; ``ValueError`` if it is no row, or only the begin of one."""
    return _DECODER.decode(line)


def read_rows(path: Path) -> list[EvaluationRow]:
    """Read the rows of a finished evaluation.

    Raises:
        FileNotFoundError: the file does not exist.
        ArtifactError: a line is not a row.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(decode_row(line))
            except ValueError as error:
                raise ArtifactError(f"{path}, line {number} is no row: {error}") from error
    return rows
