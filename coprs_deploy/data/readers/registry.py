"""Sources of examples on disk by name or path.

refcoco:testA               a split below the root: refcoco, refcoco+, refcocog, grefcoco
refcocog:google:val         the same with another way of splitting
reasonseg:val               a split of ReasonSeg below the root
FILE.parquet, FILE.jsonl    an example file, or Parquet of Hugging Face
FILE.json                   an instance file of COCO
FOLDER, FOLDER:SPLIT        Parquet files of Hugging Face, or a folder of save_to_disk
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from coprs_deploy.data.examples import Example, ExampleFile, ExampleSource, RowProblem
from coprs_deploy.data.image_checks import ImageLoader, map_in_order
from coprs_deploy.data.image_columns import load_image_source
from coprs_deploy.data.readers.arrow import STATE_FILE, ArrowRows, saved_files
from coprs_deploy.data.readers.coco import CocoExamples
from coprs_deploy.data.readers.hugging_face import (
    BOX_COLUMNS,
    MASK_COLUMNS,
    REFERENCE_COLUMNS,
    open_rows_of_hub,
)
from coprs_deploy.data.readers.image_folder import ImageFolder, find_images
from coprs_deploy.data.readers.images import ImageFiles
from coprs_deploy.data.readers.reasonseg import SPLITS, ReasonSegExamples, has_split
from coprs_deploy.data.readers.refer import ROOT_VARIABLE, SPLIT_BY, ReferExamples, splits_of
from coprs_deploy.data.rows import REQUIRED_COLUMNS, SUFFIXES, FieldError
from coprs_deploy.data.selection import Selection
from coprs_deploy.errors import ArtifactError, NoValidRowError

DICTIONARY_FILE = "dataset_dict.json"
"""File that marks a folder of ``save_to_disk`` with several splits."""

_ALIASES = {"val": "validation", "testA": "test"}
"""Name of a split to the name that data sets on Hugging Face may have for it."""


@dataclass(frozen=True)
class SourceOptions:
    """How sources are opened.

    Attributes:
        root: folder that contains public data sets; None is ``$COPRS_DEPLOY_DATA``, or the current
            folder.
        image_folder: folder of the images; None looks in the usual folders.
        first_sentences: use only the first sentence of each reference; None is what the published
            evaluation of the data set does.
    """

    root: Path | None = None
    image_folder: Path | None = None
    first_sentences: bool | None = None

    def resolved_root(self) -> Path:
        """Return the folder that contains public data sets."""
        return self.root or Path(os.environ.get(ROOT_VARIABLE) or ".")


def open_source(
    source: str | Path,
    options: SourceOptions | None = None,
    *,
    max_examples: int | None = None,
    inspect: Callable[[Example], None] | None = None,
    load: ImageLoader = load_image_source,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExampleSource:
    """Open the examples of a source; invalid rows are skipped with a warning.

    Args:
        source: name or path, as in the docstring of this module.
        options: how to open it.
        max_examples: of an example file, stop after this number of valid rows.
        inspect: called with each valid example, in order; all are decoded, in threads, and invalid
            ones are skipped.
        load: decodes the images for ``inspect``.
        on_progress: called with the numbers of examples that were decoded and of all.

    Raises:
        ValueError: the name or the split is unknown.
        FileNotFoundError: a file or folder does not exist.
        ArtifactError: a file cannot be read or has no valid example, or with ``inspect``, images
            are missing.
        MissingDependencyError: pyarrow is needed and not installed.
    """

    def open_file(path: Path) -> ExampleFile:
        return ExampleFile(path, max_examples, inspect=inspect, load=load, on_progress=on_progress)

    found = _open(str(source), options or SourceOptions(), open_file)
    if not isinstance(found, ExampleFile):  # which does both while it is opened
        if inspect is not None:
            require_images(found)
            found = _inspected(found, inspect, load, on_progress)
        if found.problems:
            warnings.warn(found.summary(), stacklevel=2)
    return found


def open_images(
    source: str | Path,
    options: SourceOptions | None = None,
    *,
    inspect: Callable[[Example], None] | None = None,
    load: ImageLoader = load_image_source,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExampleSource:
    """Open the images of a source, for what reads nothing else of its examples.

    ``source`` is a folder with image files in or below it, or a source of :func:`open_source`,
    whose other arguments and errors these are.
    """
    path = Path(source)
    if path.is_dir() and (paths := find_images(path)):
        found = ImageFolder(path, paths)
        return found if inspect is None else _inspected(found, inspect, load, on_progress)
    return open_source(source, options, inspect=inspect, load=load, on_progress=on_progress)


def _inspected(
    source: ExampleSource,
    inspect: Callable[[Example], None],
    load: ImageLoader,
    on_progress: Callable[[int, int], None] | None,
) -> ExampleSource:
    """Decode all examples of a source, and leave out the invalid ones."""

    def read(index: int) -> Example | FieldError:
        try:
            return source.read(index, load)
        except FieldError as error:
            return error

    valid, problems = [], list(source.problems)
    for index, found in enumerate(map_in_order(read, range(len(source)))):
        if isinstance(found, FieldError):
            problems.append(RowProblem(index + 1, found.field, str(found)))
        else:
            valid.append(index)
            inspect(found)
        if on_progress is not None:
            on_progress(index + 1, len(source))
    if len(valid) == len(source):
        return source
    selection = Selection(source, valid)
    selection.problems = tuple(problems)
    if not valid:
        raise NoValidRowError(f"{selection.summary()}; at least one row must be valid")
    return selection


def _open(
    text: str, options: SourceOptions, open_file: Callable[[Path], ExampleFile]
) -> ExampleSource:
    name, *parts = text.split(":")
    if name in SPLIT_BY:
        return _open_refer(name, parts, options)
    if name == "reasonseg":
        split = _only_split(name, parts, SPLITS)
        first = options.first_sentences
        return ReasonSegExamples(options.resolved_root(), split, first_sentences=first)
    path, split = _path_and_split(text)
    if path.is_dir():
        return _open_folder(path, split, options)
    if path.suffix == ".json" and path.is_file():
        return CocoExamples(path, image_folder=options.image_folder)
    if path.suffix == ".parquet" and path.is_file() and _is_of_hub(path):
        return _open_hub([path], path.name, options)
    if path.suffix not in (*SUFFIXES, ".json"):
        raise ValueError(_unknown(text))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    return open_file(path)


def all_splits(source: str | Path, options: SourceOptions | None = None) -> list[str]:
    """Return the names of all splits of a source that names none; else the source alone."""
    options, text = options or SourceOptions(), str(source)
    name, *parts = text.split(":")
    if name in SPLIT_BY and len(parts) < 2:
        split_by = parts[0] if parts and parts[0] in SPLIT_BY[name] else ""
        if parts and not split_by:
            return [text]
        found = splits_of(options.resolved_root(), name, split_by)
        return [f"{text}:{split}" for split in found]
    if name == "reasonseg" and not parts:
        root = options.resolved_root()
        found = [split for split in ("train", "val", "test") if has_split(root, split)]
        return [f"reasonseg:{split}" for split in found] or ["reasonseg:val"]
    path = Path(text)
    if path.is_dir() and not (path / STATE_FILE).is_file():
        return [f"{text}:{split}" for split in _folder_splits(path)] or [text]
    return [text]


def image_files(source: ExampleSource) -> ImageFiles | None:
    """Return the image files of a source; None if its images are in its rows."""
    found = getattr(source, "images", None)
    return found if isinstance(found, ImageFiles) else None


def require_images(source: ExampleSource) -> None:
    """Refuse a source of which images are missing.

    Raises:
        ArtifactError: the message counts them, and names the folders where they were looked for.
    """
    files = image_files(source)
    if files is not None and files.missing:
        raise ArtifactError(
            f"{source.description}: {files.report()}; download the images of the data set, or "
            "name their folder"
        )


def _open_refer(name: str, parts: list[str], options: SourceOptions) -> ReferExamples:
    if len(parts) == 2:
        split_by, split = parts
    else:
        split_by = ""
        known = "train, val, test" if name == "refcocog" else "train, val, testA, testB"
        split = _only_split(name, parts, known.split(", "))
    return ReferExamples(
        options.resolved_root(),
        name,
        split,
        split_by,
        first_sentences=bool(options.first_sentences),
        image_folder=options.image_folder,
    )


def _only_split(name: str, parts: list[str], known: list[str] | tuple[str, ...]) -> str:
    if len(parts) != 1 or not parts[0]:
        example = f"{name}:{known[1]}"
        raise ValueError(f"{':'.join([name, *parts])} names no split; accepted: {example}")
    return parts[0]


def _path_and_split(text: str) -> tuple[Path, str]:
    """Split ``FOLDER:SPLIT``; a path that exists with its colon has no split."""
    folder, _, split = text.rpartition(":")
    if folder and not Path(text).exists() and Path(folder).is_dir():
        return Path(folder), split
    return Path(text), ""


def _is_of_hub(path: Path) -> bool:
    """Whether a Parquet file has one of the forms of Hugging Face; else it is an example file."""
    columns = set(ArrowRows([path]).columns)
    if set(REQUIRED_COLUMNS) <= columns:
        return False
    forms = (REFERENCE_COLUMNS, MASK_COLUMNS, BOX_COLUMNS)
    return any(set(form) <= columns for form in forms)


def _open_hub(paths: list[Path], description: str, options: SourceOptions) -> ExampleSource:
    return open_rows_of_hub(
        paths,
        description,
        first_sentences=bool(options.first_sentences),
        root=options.root,
        image_folder=options.image_folder,
    )


def _open_folder(folder: Path, split: str, options: SourceOptions) -> ExampleSource:
    name = f"{folder.name}:{split}" if split else folder.name
    if (folder / STATE_FILE).is_file() and not split:
        return _open_hub(saved_files(folder), name, options)
    splits = _folder_splits(folder)
    if not splits:
        raise ArtifactError(
            f"{folder} has no {STATE_FILE}, {DICTIONARY_FILE} or Parquet files; accepted: a folder "
            "of save_to_disk, or a data set of Hugging Face with its files in data/"
        )
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits and _ALIASES.get(split) in splits:
        split = _ALIASES[split]
    if split not in splits:
        wanted = f"has no split {split!r}" if split else "has several splits"
        raise ValueError(f"{folder} {wanted}; accepted: {folder}:SPLIT with {', '.join(splits)}")
    paths = splits[split]
    return _open_hub(saved_files(paths[0]) if paths[0].is_dir() else paths, name, options)


def _folder_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the splits of a folder: a saved folder, or Parquet files, of each."""
    path = folder / DICTIONARY_FILE
    if path.is_file():
        try:
            names = msgspec.json.decode(path.read_bytes(), type=dict[str, list[str]])["splits"]
        except (msgspec.DecodeError, KeyError) as error:
            raise ArtifactError(f"{path} lists no splits: {error}") from error
        return {name: [folder / name] for name in names}
    splits: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        splits.setdefault(file.stem.split("-")[0], []).append(file)
    return splits


def _unknown(text: str) -> str:
    name = text.split(":", maxsplit=1)[0]
    if name == "synthetic":
        return (
            f"source is {text!r}, and synthetic scenes are not read from disk: `evaluate` takes "
            "synthetic:PRESET, a recipe data.kind = 'synthetic'; for all others, write them with "
            "`coprs-deploy synth --out FILE.parquet`"
        )
    known = [*SPLIT_BY, "reasonseg", "synthetic"]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {text.replace(name, nearest[0], 1)}?" if nearest else ""
    return (
        f"source is {text!r}, which is neither a path that exists nor a known name; accepted: "
        f"{', '.join(f'{each}:SPLIT' for each in known)}, a .parquet, .jsonl or .json file, or a "
        f"folder of Hugging Face{hint}"
    )
