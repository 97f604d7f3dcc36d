"""Image files of a data set, looked up by name in the folders where they are usually kept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import load_image_source
from coprs_deploy.data.rows import FieldError
from coprs_deploy.images import RgbArray

LISTED_NAMES = 3
"""Missing files that an error names."""


class ImageFiles:
    """Paths of the images of a data set, in the folder that has most of them.

    Attributes:
        num_wanted: number of distinct images.
        folder: the folder with most of them; the first one if none has any.
        missing: names of the images that it lacks.
    """

    def __init__(self, names: Iterable[str], folders: Sequence[Path]) -> None:
        """Look for images in folders.

        Args:
            names: paths of the images relative to their folder, or names.
            folders: at least one folder, the most usual one first.
        """
        wanted = self._wanted = set(names)
        self.num_wanted = len(wanted)
        found = {folder: _existing(folder, wanted) for folder in folders}
        self.folder = max(found, key=lambda folder: len(found[folder]))
        self.missing = sorted(wanted - found[self.folder])
        self._num_found = {folder: len(names) for folder, names in found.items()}
        self._last: tuple[str, RgbArray] | None = None

    def path(self, name: str) -> Path:
        """Return the path of an image."""
        return self.folder / name

    def load(self, name: str, load: ImageLoader = load_image_source) -> RgbArray:
        """Decode an image; the last one is kept, because sentences on one image are neighbors.

        With another loader, nothing is kept.

        Raises:
            FieldError: the image does not exist, or cannot be decoded.
        """
        last = self._last
        if last is not None and last[0] == name and load is load_image_source:
            return last[1]
        path = self.path(name)
        if not path.is_file():
            raise FieldError("image", f"{path} does not exist")
        image = load(path, "image")
        if load is load_image_source:
            self._last = (name, image)
        return image

    def empty(self) -> list[str]:
        """Return the names of image files without content, as a stopped download leaves them."""
        found = self._wanted - set(self.missing)
        return sorted(name for name in found if not self.path(name).stat().st_size)

    def report(self) -> str:
        """Return one sentence: how many images were found, and where they were looked for."""
        num_found = self.num_wanted - len(self.missing)
        looked = ", ".join(
            f"{folder} ({'no such folder' if not folder.is_dir() else f'{number:,} of them'})"
            for folder, number in self._num_found.items()
        )
        named = ", ".join(self.missing[:LISTED_NAMES])
        more = ", ..." if len(self.missing) > LISTED_NAMES else ""
        lacking = f"; missing: {named}{more}" if self.missing else ""
        return f"{num_found:,} of {self.num_wanted:,} images found; looked in {looked}{lacking}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_last": None}


def _existing(folder: Path, wanted: set[str]) -> set[str]:
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        listed = {entry.name for entry in entries}
    nested = {name for name in wanted if "/" in name and (folder / name).is_file()}
    return (wanted & listed) | nested
