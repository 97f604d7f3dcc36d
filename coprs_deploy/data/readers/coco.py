"""Instance files of COCO as examples: one instruction about the annotations that share it.

If annotations have a ``caption``, annotations of an image with the same caption are the targets of
one example. Without captions the instruction is the name of a category, its instances on an image
are the targets, and its crowd regions are the ignore mask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coprs_deploy.data.examples import Example, ExampleSource, RowProblem
from coprs_deploy.data.image_checks import ImageLoader
from coprs_deploy.data.image_columns import image_name_of, load_image_source
from coprs_deploy.data.readers.images import ImageFiles
from coprs_deploy.data.readers.instances import InstanceFile, check_size, stack_masks
from coprs_deploy.data.rows import FieldError
from coprs_deploy.errors import NoValidRowError


class CocoExamples(ExampleSource):
    """Captions or categories of an instance file of COCO.

    Attributes:
        instances: the instance file.
        images: the image files.
    """

    def __init__(self, path: Path, *, image_folder: Path | None = None) -> None:
        """Open an instance file.

        Args:
            path: a ``.json`` file.
            image_folder: folder of the images; None looks beside the file and its folder.

        Raises:
            FileNotFoundError: the file does not exist.
            ArtifactError: the file is not an instance file of COCO.
            NoValidRowError: no annotation has a mask and a caption or category.
        """
        self.description, self.files = path.name, (path,)
        self.instances = InstanceFile(path)
        self._groups: dict[tuple[int, str], list[int]] = {}
        self._crowds: dict[tuple[int, str], list[int]] = {}
        problems = []
        for position in range(len(self.instances)):
            try:
                self._add(position)
            except FieldError as error:
                problems.append(RowProblem(position + 1, error.field, str(error)))
        self._keys = list(self._groups)
        self.problems, self.num_rows = tuple(problems), len(self.instances)
        self.num_targets = [len(positions) for positions in self._groups.values()]
        self.question_types = [""] * len(self._keys)
        if not self._keys:
            first = f": {problems[0]}" if problems else ""
            raise NoValidRowError(f"{path} has no annotation that can be used{first}")
        names = {self.instances.images[image_id].file_name for image_id, _ in self._keys}
        folders = [image_folder] if image_folder else _image_folders(path)
        self.images = ImageFiles(names, folders)

    def _add(self, position: int) -> None:
        """Add an annotation to its group; FieldError if it cannot be used."""
        instances = self.instances
        image_id = int(instances.image_ids[position])
        if image_id not in instances.images:
            raise FieldError("image_id", f"image {image_id} is not in the file")
        if not instances.has_segmentation(position):
            raise FieldError("segmentation", "there is none; a bounding box is not a mask")
        if instances.is_empty[position]:
            raise FieldError("segmentation", "it is empty; leave out the annotation")
        groups = self._groups
        if instances.captions:
            text = instances.captions.get(position, "")
            if not text.strip():
                raise FieldError("caption", "there is none, but other annotations have one")
        else:
            category_id = int(instances.category_ids[position])
            text = instances.category_names.get(category_id, "")
            if not text.strip():
                raise FieldError("category_id", f"category {category_id} has no name in the file")
            if instances.is_crowd[position]:
                groups = self._crowds
        groups.setdefault((image_id, text.strip()), []).append(position)

    def read(self, index: int, load: ImageLoader = load_image_source) -> Example:
        """Decode image and masks of an example; FieldError if one of them is invalid."""
        key = image_id, text = self._keys[index]
        record = self.instances.images[image_id]
        image = self.images.load(record.file_name, load)
        check_size(record, image, self.images.path(record.file_name))
        masks = [self.instances.mask(position) for position in self._groups[key]]
        for mask, position in zip(masks, self._groups[key], strict=True):
            if not mask.any():
                raise FieldError(
                    "masks", f"annotation {self.instances.ids[position]} covers no pixel"
                )
        crowds = [self.instances.mask(position) for position in self._crowds.get(key, ())]
        return Example(
            id=f"{image_id}-{index}",
            image=image,
            instruction=text,
            masks=stack_masks(masks, image.shape[:2]),
            source=self.description,
            ignore_mask=np.any(crowds, axis=0) if crowds else None,
        )

    def image_file(self, index: int) -> Path:
        """Return the path of the image of an example."""
        return self.images.path(self.instances.images[self._keys[index][0]].file_name)

    def image_name(self, index: int) -> str:
        """Return the stem of the image file, or its number in COCO."""
        return image_name_of(self.image_file(index))

    def num_same_class(self, index: int) -> int | None:
        """Return the number of other objects of the targets' categories in the image, if known."""
        return self.instances.num_same_class(self._groups[self._keys[index]])

    @property
    def num_images(self) -> int:
        """Number of images with an example."""
        return len({image_id for image_id, _ in self._keys})


def _image_folders(path: Path) -> list[Path]:
    """Return where the images of ``annotations/instances_val2017.json`` may be."""
    split = path.stem.removeprefix("instances_")
    parents = (path.parent.parent, path.parent)
    return [
        folder
        for parent in parents
        for folder in (parent / split, parent / "images" / split, parent / "images", parent)
    ]
