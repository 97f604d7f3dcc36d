"""Selections of a source of examples: the first ones, or those on images of no other source."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from coprs_deploy.data.examples import Example, ExampleSource
from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import load_image_source


class Selection(ExampleSource):
    """Some examples of a source, in its order.

    Attributes:
        source: the source.
        indices: positions of the selected examples in the source.
    """

    def __init__(self, source: ExampleSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.description, self.num_rows = source.description, source.num_rows
        self.problems, self.files = source.problems, source.files
        self.has_references, self.has_no_match = source.has_references, source.has_no_match
        self.num_targets = [source.num_targets[i] for i in indices]
        self.question_types = [source.question_types[i] for i in indices]

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode an example; FieldError if a part of it is invalid."""
        return self.source.read(self.indices[index], load)

    def image_file(self, index: int) -> bytes | Path:
        """Return the image file of an example: its bytes, or its path."""
        return self.source.image_file(self.indices[index])

    def image_name(self, index: int) -> str:
        """Return the name of the image of an example."""
        return self.source.image_name(self.indices[index])

    def num_same_class(self, index: int) -> int | None:
        """Return the number of other objects of the targets' categories in the image, if known."""
        return self.source.num_same_class(self.indices[index])


def image_names(source: ExampleSource) -> set[str]:
    """Return the names of the images of a source, without decoding them."""
    return {source.image_name(index) for index in range(len(source))}


def exclude_images(source: ExampleSource, excluded: Collection[str]) -> Selection:
    """Select the examples whose image has none of the excluded names.

    Raises:
        ValueError: only one side names images by a hash of their bytes, so that an image could be
            in both unnoticed.
    """
    names = [source.image_name(index) for index in range(len(source))]
    if excluded and names:
        unnamed, named = (
            {name.startswith("bytes-") for name in each} for each in (names, excluded)
        )
        if len(unnamed | named) > 1:
            raise ValueError(
                f"images of {source.description} and of the excluded sources cannot be compared: "
                "some have a file name and others only bytes; take both from files of the same kind"
            )
    return Selection(source, [i for i, name in enumerate(names) if name not in excluded])
