"""ReasonSeg in the layout of LISA.

    ROOT/ReasonSeg/{train,val,test}/<stem>.jpg, <stem>.json
    ROOT/ReasonSeg/explanatory/train.json

The shapes of an image are painted into one target: regions labeled "ignore" belong to the ignore
mask, those labeled "flag" are left out. Shapes of the largest area are painted first, so that
smaller ones lie on top, ignored regions and targets alike. The pixels of a shape are those that
OpenCV draws, its outline included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from coprs_deploy.data.examples import Example, ExampleSource, RowProblem
from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import image_name_of, load_image_source
from coprs_deploy.data.readers.images import ImageFiles
from coprs_deploy.data.readers.polygon_fill import fill_polygon
from coprs_deploy.data.readers.refer import ROOT_VARIABLE
from coprs_deploy.data.rows import FieldError
from coprs_deploy.errors import ArtifactError
from coprs_deploy.prompts import REFERENCE_TOKEN

SPLITS = ("train", "val", "test", "explanatory")
"""``explanatory`` is the part of ``train`` that has explanations."""

FOLDERS = ("ReasonSeg", "reason_seg/ReasonSeg", "reasonseg", "")
"""Folders of the splits below the root."""

IMAGE_SUFFIX = ".jpg"

MAX_COORDINATE = 2**30
"""Largest x or y of a shape; OpenCV computes with 32 bits."""

TARGET, IGNORED = 1, 255
"""Values of painted pixels, as LISA has them."""


class Shape(msgspec.Struct):
    """A polygon of an image.

    Attributes:
        label: name that says whether it is a target, ignored, or left out.
        points: x and y of each point, in pixels.
    """

    label: str
    points: list[tuple[float, float]]


class Annotation(msgspec.Struct):
    """The JSON file of an image.

    Attributes:
        text: queries that mean the same.
        shapes: polygons.
        is_sentence: whether the queries are long sentences or short phrases.
    """

    text: list[str]
    shapes: list[Shape]
    is_sentence: bool = False


class _Explanation(msgspec.Struct):
    image: str
    query: str
    outputs: str


class ReasonSegExamples(ExampleSource):
    """Queries of a split of ReasonSeg; the question type is ``long`` or ``short``.

    Attributes:
        images: the image files.
        num_images: number of images with an annotation, or of explanations.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        first_sentences: bool | None = None,
    ) -> None:
        """Open a split.

        Args:
            root: folder that contains ``ReasonSeg``, or the folders of the splits.
            split: one of ``SPLITS``; of ``explanatory``, the query and the response are those of
                the explanation.
            first_sentences: use only the first query of each image; None does so except in
                ``train``, as the published evaluation.

        Raises:
            ValueError: the split is unknown.
            FileNotFoundError: the folder of the split does not exist or is empty.
            ArtifactError: the explanations cannot be read.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
        self.description = f"reasonseg:{split}"
        folder = _find_folder(root, "train" if split == "explanatory" else split)
        self.folder = folder
        self._stems: list[str] = []
        self._texts: list[str] = []
        self._numbers: list[int] = []
        self._responses: list[str] = []
        self.question_types: list[str] = []
        self.num_targets: list[int] = []
        problems: list[RowProblem] = []
        paths = sorted(folder.glob("*.json"))
        self.files: list[Path] = [*paths]
        if split == "explanatory":
            self.files.append(folder.parent / "explanatory/train.json")
            problems += self._add_explanations(self.files[-1])
        else:
            if first_sentences is None:
                first_sentences = split != "train"
            for row, path in enumerate(paths, start=1):
                problems += self._add_annotation(row, path, first_sentences)
        self.problems = tuple(problems)
        self.num_rows = len(self._stems) + len(problems)
        stems = set(self._stems)
        self.num_images = len(stems) if split == "explanatory" else len(paths)
        self.images = ImageFiles((f"{stem}{IMAGE_SUFFIX}" for stem in stems), [folder])

    def _add_annotation(self, row: int, path: Path, first_sentences: bool) -> list[RowProblem]:
        try:
            annotation = read_annotation(path)
        except FieldError as error:
            return [RowProblem(row, error.field, str(error))]
        texts = annotation.text[:1] if first_sentences else annotation.text
        for number, text in enumerate(texts):
            self._add(path.stem, number, text, "", annotation)
        return []

    def _add_explanations(self, path: Path) -> list[RowProblem]:
        try:
            explanations = msgspec.json.decode(path.read_bytes(), type=list[_Explanation])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is not a list of explanations: {error}") from error
        problems = []
        for row, explanation in enumerate(explanations, start=1):
            stem = Path(explanation.image).stem
            try:
                annotation = read_annotation(self.folder / f"{stem}.json")
            except FieldError as error:
                problems.append(RowProblem(row, error.field, str(error)))
            else:
                response = f"<think>{explanation.outputs.strip()}</think> {REFERENCE_TOKEN}"
                self._add(stem, row - 1, explanation.query, response, annotation)
        return problems

    def _add(
        self, stem: str, number: int, text: str, response: str, annotation: Annotation
    ) -> None:
        self._stems.append(stem)
        self._numbers.append(number)
        self._texts.append(text)
        self._responses.append(response)
        self.question_types.append("long" if annotation.is_sentence else "short")
        self.num_targets.append(int(any(_value(shape) == TARGET for shape in annotation.shapes)))

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode image and masks of a query; FieldError if one of them is invalid."""
        stem = self._stems[index]
        image = self.images.load(f"{stem}{IMAGE_SUFFIX}", load)
        shapes = read_annotation(self.folder / f"{stem}.json").shapes
        painted = paint_shapes(shapes, *image.shape[:2])
        target, ignored = painted == TARGET, painted == IGNORED
        return Example(
            id=f"{stem}-{self._numbers[index]}",
            image=image,
            instruction=self._texts[index],
            masks=target[None][: int(target.any())],
            response=self._responses[index] if target.any() else "",
            question_type=self.question_types[index],
            source=self.description,
            ignore_mask=ignored if ignored.any() else None,
        )

    def image_file(self, index: int) -> Path:
        """Return the path of the image of a query."""
        return self.images.path(f"{self._stems[index]}{IMAGE_SUFFIX}")

    def image_name(self, index: int) -> str:
        """Return the stem of the image file."""
        return image_name_of(Path(self._stems[index]))


def read_annotation(path: Path) -> Annotation:
    """Read the annotation of an image, in UTF-8 or else in cp1252.

    Raises:
        FieldError: the file cannot be read, or has another form.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FieldError("", f"{path.name} cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    try:
        annotation = msgspec.json.decode(text, type=Annotation)
    except msgspec.DecodeError as error:
        raise FieldError("", f"{path.name}: {error}") from error
    if not any(each.strip() for each in annotation.text[:1]):
        raise FieldError("text", f"{path.name} has no query in text")
    for shape in annotation.shapes:
        if not shape.points:
            raise FieldError("shapes", f"{path.name} has a shape without points ({shape.label!r})")
        if any(abs(number) > MAX_COORDINATE for point in shape.points for number in point):
            raise FieldError(
                "shapes",
                f"{path.name} has a shape far outside of every image ({shape.label!r}); "
                "coordinates are pixels",
            )
    return annotation


def paint_shapes(shapes: Sequence[Shape], height: int, width: int) -> NDArray[np.uint8]:
    """Paint shapes over each other, the largest area first.

    Returns:
        (height, width) uint8: ``TARGET``, ``IGNORED``, or 0 for the background.
    """
    painted = [
        (fill_polygon(shape.points, height, width), _value(shape))
        for shape in shapes
        if _value(shape)
    ]
    # Descending, and of two equal areas the later one first, as a reversed stable sort has them.
    painted.sort(key=lambda pair: int(pair[0].sum()))
    canvas = np.zeros((height, width), dtype=np.uint8)
    for covered, value in reversed(painted):
        canvas[covered] = value
    return canvas


def _value(shape: Shape) -> int:
    """Return the value that a shape is painted with; 0 for a shape that is left out."""
    label = shape.label.lower()
    if label == "flag":
        return 0
    return IGNORED if "ignore" in label else TARGET


def has_split(root: Path, split: str) -> bool:
    """Whether there is a folder with annotations of a split."""
    return any(any((root / folder / split).glob("*.json")) for folder in FOLDERS)


def _find_folder(root: Path, split: str) -> Path:
    candidates = [root / folder / split for folder in FOLDERS]
    for candidate in candidates:
        if any(candidate.glob("*.json")):
            return candidate
    looked = ", ".join(
        f"{path} ({'no JSON files' if path.is_dir() else 'no such folder'})" for path in candidates
    )
    raise FileNotFoundError(
        f"the split {split} of ReasonSeg is missing: looked in {looked}; each image must have "
        f"<stem>.jpg and <stem>.json there; name the root with --root or ${ROOT_VARIABLE}"
    )
