"""Folders of images without instructions, as a source for what reads only the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from coprs_deploy.data.examples import Example, ExampleSource
from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import image_name_of, load_image_source

UNLABELED = "(no instruction)"
"""Instruction of an image without one."""


def find_images(directory: Path) -> list[Path]:
    """List the image files in and below a directory, by name.

    Raises:
        ValueError: there is no such directory.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; accepted: a directory of images")
    suffixes = Image.registered_extensions()
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in suffixes and path.is_file()
    ]


class ImageFolder(ExampleSource):
    """The image files in and below a folder, each as an example without instruction and masks."""

    def __init__(self, folder: Path, paths: list[Path]) -> None:
        self.description, self.num_rows = str(folder), len(paths)
        self._folder, self._paths = folder, paths
        self.num_targets = [0] * len(paths)
        self.question_types = [""] * len(paths)

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode an image; FieldError if that is impossible."""
        image = load(self._paths[index], "image")
        masks = np.zeros((0, *image.shape[:2]), np.bool_)
        return Example(str(self._paths[index].relative_to(self._folder)), image, UNLABELED, masks)

    def image_file(self, index: int) -> Path:
        """Return the path of an image."""
        return self._paths[index]

    def image_name(self, index: int) -> str:
        """Return the name of an image."""
        return image_name_of(self._paths[index])
