"""Conversion of sources to an example file, without the images of other sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coprs_deploy.artifacts import atomic_write
from coprs_deploy.data.examples import ExampleSource, row_of_example
from coprs_deploy.data.rows import FieldError, row_writer
from coprs_deploy.data.selection import exclude_images, image_names


@dataclass
class ConversionReport:
    """Result of a conversion.

    Attributes:
        num_written: number of examples in the file.
        num_excluded: number of examples on excluded images.
        num_excluded_images: number of their images.
        problems: one text for each invalid row and each example that cannot be decoded; both are
            left out.
    """

    num_written: int = 0
    num_excluded: int = 0
    num_excluded_images: int = 0
    problems: list[str] = field(default_factory=list)


def convert_sources(
    sources: Sequence[ExampleSource],
    out: Path,
    *,
    excluded: Sequence[ExampleSource] = (),
    embed_images: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write the examples of sources to one example file, atomically.

    Args:
        sources: at least one source; of several, ids start with the name of the source.
        out: a ``.parquet`` or ``.jsonl`` file; an existing file is replaced.
        excluded: examples on any image of these sources are left out.
        embed_images: write the bytes of image files; else their paths, relative to the file where
            they lie below its folder. Images that have no file are always embedded.
        on_progress: called with the numbers of examples that are done and to do.

    Raises:
        ValueError: the suffix is not supported, or images cannot be compared by name.
        MissingDependencyError: the file is Parquet and pyarrow is not installed.
    """
    problems = [f"{each.description}, {problem}" for each in sources for problem in each.problems]
    report = ConversionReport(problems=problems)
    names: set[str] = set().union(*map(image_names, excluded))
    selections = [exclude_images(source, names) for source in sources]
    for source, selection in zip(sources, selections, strict=True):
        report.num_excluded += len(source) - len(selection)
        report.num_excluded_images += len(image_names(source) & names)
    total, done = sum(map(len, selections)), 0
    with atomic_write(out) as partial, row_writer(partial, out.suffix) as write:
        for selection in selections:
            for index in range(len(selection)):
                done += 1
                try:
                    example = selection.read(index)
                except FieldError as error:
                    where = f"{selection.description}, example {selection.indices[index] + 1}"
                    report.problems.append(f"{where}, {error.field}: {error}")
                    continue
                if len(sources) > 1:
                    example = replace(example, id=f"{selection.description}:{example.id}")
                file = selection.image_file(index)
                if isinstance(file, Path) and embed_images:
                    file = file.read_bytes()
                if isinstance(file, Path):
                    write(row_of_example(example, image_path=_path_from(out.parent, file)))
                else:
                    write(row_of_example(example, image=file))
                report.num_written += 1
                if on_progress is not None:
                    on_progress(done, total)
    return report


def _path_from(folder: Path, file: Path) -> str:
    """Return the path of a file relative to a folder that contains it, else the absolute path."""
    file, folder = file.resolve(), folder.resolve()
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)
