"""Data sets in the layout of REFER: RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO.

    ROOT/refcoco/refs(unc).p, instances.json        also refs(google).p
    ROOT/refcoco+/refs(unc).p, instances.json
    ROOT/refcocog/refs(umd).p, instances.json       also refs(google).p
    ROOT/grefcoco/grefs(unc).json or .p, instances.json

Images are COCO's ``train2014``. Each sentence of a reference is an example. The masks of RefCOCO
have one target; those of gRefCOCO none, one or several, crowd annotations left out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coprs_deploy.data.examples import Example, ExampleSource, RowProblem
from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import image_name_of, load_image_source
from coprs_deploy.data.readers.images import ImageFiles
from coprs_deploy.data.readers.instances import InstanceFile, check_size, stack_masks
from coprs_deploy.data.readers.pickles import read_plain_pickle
from coprs_deploy.errors import ArtifactError

SPLIT_BY = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "grefcoco": ("unc",),
}
"""Data set to the ways in which it is split, the default one first."""

ROOT_VARIABLE = "COPRS_DEPLOY_DATA"
"""Environment variable with the folder of the public data sets."""

NO_TARGET = -1
"""Annotation id of a sentence that nothing matches, in gRefCOCO."""

IMAGE_FOLDERS = (
    *("images/mscoco/images/train2014", "images/train2014", "train2014", "images"),
    *("coco/train2014", "coco2014/train2014"),
)
"""Folders of the images below the root: LISA's, that of ReLA and Seg-Zero, and others."""


class _Sentence(msgspec.Struct, gc=False):
    sent_id: int
    sent: str


class _Reference(msgspec.Struct):
    ref_id: int
    ann_id: int | list[int]
    image_id: int
    split: str
    sentences: list[_Sentence]

    @property
    def annotation_ids(self) -> list[int]:
        return self.ann_id if isinstance(self.ann_id, list) else [self.ann_id]


class ReferExamples(ExampleSource):
    """Sentences of a split of a data set in the layout of REFER.

    Only gRefCOCO has no-match examples; elsewhere, an annotation may be empty.

    Attributes:
        num_refs: number of references of the split, invalid ones included.
        splits: number of references of each split in the file, by its name there.
        images: the image files.
        instances: the instance file.
    """

    has_references = True

    def __init__(
        self,
        root: Path,
        dataset: str,
        split: str,
        split_by: str = "",
        *,
        first_sentences: bool = False,
        image_folder: Path | None = None,
    ) -> None:
        """Open a split.

        Args:
            root: folder that contains the folder of the data set.
            dataset: a key of ``SPLIT_BY``.
            split: name of the split, as in ``testA``.
            split_by: a value of ``SPLIT_BY``; empty selects the default.
            first_sentences: use only the first sentence of each reference.
            image_folder: folder of the images; None looks in ``IMAGE_FOLDERS``.

        Raises:
            ValueError: ``split_by`` is unknown, or no reference belongs to the split.
            FileNotFoundError: a file does not exist.
            ArtifactError: a file cannot be read.
        """
        folder = root / dataset
        split_by = split_by or SPLIT_BY[dataset][0]
        path = find_reference_file(folder, dataset, split_by)
        self.description = f"{dataset}:{split_by}:{split}"
        self.instances = InstanceFile(folder / "instances.json")
        self.splits: dict[str, int] = {}
        self.num_refs = 0
        self.files = (path, self.instances.path)
        self._is_generalized = self.has_no_match = dataset == "grefcoco"
        self._ref_ids, self._sent_ids = array("q"), array("q")
        self._text, self._text_ends = b"", array("q", [0])
        self._ref_of_sentence = array("q")
        self._image_ids = array("q")
        self._targets: list[tuple[int, ...]] = []
        self._index(self._references(path, split), path, split, first_sentences)
        names = (self.instances.images[i].file_name for i in set(self._image_ids))
        folders = [image_folder] if image_folder else [root / name for name in IMAGE_FOLDERS]
        self.images = ImageFiles(names, folders)

    def _references(self, path: Path, split: str) -> Iterator[tuple[int, _Reference]]:
        """Yield the references of the split with their number in the file, from 1."""
        for number, reference in enumerate(_read_references(path), start=1):
            self.splits[reference.split] = self.splits.get(reference.split, 0) + 1
            if in_split(reference.split, split):
                self.num_refs += 1
                yield number, reference

    def _index(
        self,
        references: Iterator[tuple[int, _Reference]],
        path: Path,
        split: str,
        first_sentences: bool,
    ) -> None:
        problems: list[RowProblem] = []
        num_rows, types, text = 0, list[str](), bytearray()
        for number, reference in references:
            sentences = reference.sentences[:1] if first_sentences else reference.sentences
            num_rows += len(sentences)
            try:
                targets = self._positions(reference)
            except ValueError as error:
                problems.append(RowProblem(number, "ann_id", str(error)))
                continue
            self._ref_ids.append(reference.ref_id)
            self._image_ids.append(reference.image_id)
            self._targets.append(targets)
            for sentence in sentences:
                if not sentence.sent.strip():
                    reason = f"sentence {sentence.sent_id} is empty"
                    problems.append(RowProblem(number, "sentences", reason))
                    continue
                self._ref_of_sentence.append(len(self._ref_ids) - 1)
                self._sent_ids.append(sentence.sent_id)
                text += sentence.sent.encode("utf-8", "surrogatepass")
                self._text_ends.append(len(text))
                types.append(self._question_type(len(targets)))
        if not self.num_refs:
            found = ", ".join(f"{name} ({count:,})" for name, count in self.splits.items())
            raise ValueError(f"split is {split!r}; {path} has the splits {found or '(none)'}")
        # One object for all sentences: as many small ones would keep the memory of the file.
        self._text = bytes(text)
        self.num_rows, self.question_types, self.problems = num_rows, types, tuple(problems)
        self.num_targets = array("i", (len(self._targets[ref]) for ref in self._ref_of_sentence))

    def _positions(self, reference: _Reference) -> tuple[int, ...]:
        """Return the positions of the annotations with a mask; ValueError if one is missing."""
        where = f"{self.instances.path}; use the instances.json that belongs to the references"
        if reference.image_id not in self.instances.images:
            raise ValueError(f"image {reference.image_id} is not in {where}")
        ids = [each for each in reference.annotation_ids if each != NO_TARGET]
        positions = self.instances.positions(np.array(ids, dtype=np.int64)).tolist()
        if -1 in positions:
            raise ValueError(f"annotation {ids[positions.index(-1)]} is not in {where}")
        for position in positions:
            image_id = int(self.instances.image_ids[position])
            if image_id != reference.image_id:
                raise ValueError(
                    f"annotation {self.instances.ids[position]} is on image {image_id}, the "
                    f"reference on image {reference.image_id}"
                )
        if self._is_generalized:
            positions = [each for each in positions if not self.instances.is_crowd[each]]
        return tuple(each for each in positions if not self.instances.is_empty[each])

    def _question_type(self, num_targets: int) -> str:
        if not self._is_generalized:
            return ""
        return ("no_target", "single_target")[num_targets] if num_targets < 2 else "multi_target"

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode image and masks of a sentence; FieldError if one of them is invalid."""
        ref = self._ref_of_sentence[index]
        record = self.instances.images[self._image_ids[ref]]
        image = self.images.load(record.file_name, load)
        check_size(record, image, self.images.path(record.file_name))
        masks = [self.instances.mask(position) for position in self._targets[ref]]
        begin, end = self._text_ends[index : index + 2]
        return Example(
            id=f"{self._ref_ids[ref]}-{self._sent_ids[index]}",
            image=image,
            instruction=self._text[begin:end].decode("utf-8", "surrogatepass"),
            masks=stack_masks(masks, image.shape[:2]),
            question_type=self.question_types[index],
            source=self.description,
        )

    def image_file(self, index: int) -> Path:
        """Return the path of the image of a sentence."""
        return self.images.path(self._record_name(index))

    def image_name(self, index: int) -> str:
        """Return the number of the image in COCO."""
        return image_name_of(Path(self._record_name(index)))

    def num_same_class(self, index: int) -> int | None:
        """Return the number of other objects of the targets' categories in the image, if known."""
        return self.instances.num_same_class(self._targets[self._ref_of_sentence[index]])

    def _record_name(self, index: int) -> str:
        return self.instances.images[self._image_ids[self._ref_of_sentence[index]]].file_name


def in_split(found: str, split: str) -> bool:
    """Whether a reference whose split is ``found`` belongs to a split, by the rules of REFER.

    ``testA`` and ``testB`` match on the letter, so that ``testAB`` belongs to both; ``test``
    matches any name that contains it.
    """
    if split in ("testA", "testB", "testC"):
        return split[-1] in found
    return split in found if split == "test" else found == split


def splits_of(root: Path, dataset: str, split_by: str = "") -> list[str]:
    """Return the splits of a data set in the order of its file; those of a letter each for "AB".

    Raises:
        FileNotFoundError: the file of references does not exist.
        ArtifactError: the file cannot be read.
    """
    path = find_reference_file(root / dataset, dataset, split_by or SPLIT_BY[dataset][0])
    found = dict.fromkeys(reference.split for reference in _read_references(path))
    names: dict[str, None] = {}
    for name in found:
        letters = name.removeprefix("test")
        parts = [f"test{letter}" for letter in letters] if name != letters and letters else [name]
        names |= dict.fromkeys(parts)
    return list(names)


def find_reference_file(folder: Path, dataset: str, split_by: str) -> Path:
    """Return the file of references of a data set.

    Raises:
        ValueError: the data set has no such way of splitting.
        FileNotFoundError: the file does not exist; the message names what is there.
    """
    if split_by not in SPLIT_BY[dataset]:
        raise ValueError(
            f"{dataset} is split by {split_by!r}; accepted: {', '.join(SPLIT_BY[dataset])}"
        )
    stem = "grefs" if dataset == "grefcoco" else "refs"
    suffixes = (".json", ".p") if dataset == "grefcoco" else (".p",)
    for suffix in suffixes:
        if (path := folder / f"{stem}({split_by}){suffix}").is_file():
            return path
    wanted = " or ".join(f"{stem}({split_by}){suffix}" for suffix in suffixes)
    others = sorted(path.name for path in folder.glob("*refs(*"))
    if others:
        raise FileNotFoundError(
            f"{folder} has {', '.join(others)} where {wanted} was requested; name the split that "
            f"is there, as in {dataset}:{others[0].partition('(')[2].partition(')')[0]}:val, or "
            "download the other file"
        )
    looked = folder if folder.is_dir() else f"{folder} (no such folder)"
    raise FileNotFoundError(
        f"{wanted} is missing: looked in {looked}; the root must contain {dataset}/{wanted} and "
        f"{dataset}/instances.json; name it with --root or ${ROOT_VARIABLE}"
    )


def _read_references(path: Path) -> list[_Reference]:
    if path.suffix == ".json":
        convert: Any = msgspec.json.Decoder(list[_Reference]).decode
        content: Any = path.read_bytes()
    else:
        convert, content = _convert, read_plain_pickle(path)
    try:
        references: list[_Reference] = convert(content)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path} is not a list of references as REFER has it, or the download is incomplete: "
            f"{error}"
        ) from error
    return references


def _convert(content: object) -> list[_Reference]:
    return msgspec.convert(content, list[_Reference])
