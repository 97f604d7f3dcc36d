"""Generated scenes as training batches: images on disk, questions generated on the fly.

The batch of a step depends on the seed and the step alone, so a resumed run sees the same batches
as an uninterrupted one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coprs_deploy.artifacts import new_directory
from coprs_deploy.data.synthetic import vocabulary
from coprs_deploy.data.synthetic.examples import with_question_types
from coprs_deploy.data.synthetic.presets import HELD_OUT_SEED, Preset
from coprs_deploy.data.synthetic.questions import Question, ask_questions
from coprs_deploy.data.synthetic.scene import Scene, SceneObject, make_scene
from coprs_deploy.specs import Geometry
from coprs_deploy.training.batches import EpochOrder

_MARKER, _IMAGES, _INSTANCE_MAP = "scenes.json", "images.npy", "instance_map.npy"

_SCENES_PER_TASK, _CORPUS_SCENES = 500, 2000


class SceneBatch(NamedTuple):
    """Scenes as tensors.

    Attributes:
        images: uint8 (B, S, S, 3) RGB.
        instance_map: uint8 (B, S, S); 0 is background, n a pixel of object n - 1.
        attributes: int64 (B, M, 6), indices into the :func:`attribute_values` of each object; 0
            beyond the last object.
        centers: float32 (B, M, 2), x and y in pixels.
        num_objects: int64 (B,).
    """

    images: Tensor
    instance_map: Tensor
    attributes: Tensor
    centers: Tensor
    num_objects: Tensor


@dataclass(frozen=True)
class StoredScenes:
    """Scenes on disk, memory-mapped.

    Attributes:
        images: uint8 (N, S, S, 3) RGB.
        instance_map: uint8 (N, S, S); 0 is background, n a pixel of object n - 1.
        objects: objects of each scene.
    """

    images: NDArray[np.uint8]
    instance_map: NDArray[np.uint8]
    objects: list[tuple[SceneObject, ...]]

    def __len__(self) -> int:
        return len(self.objects)

    def scene(self, index: int) -> Scene:
        """Return one scene."""
        return Scene(self.images[index], self.instance_map[index], self.objects[index])


def store_scenes(
    preset: Preset, first_seed: int, count: int, folder: Path, num_workers: int = 0
) -> StoredScenes:
    """Render ``count`` scenes from a first seed into a subfolder, unless it holds them.

    Worker processes render; without workers, this process does.
    """
    path = folder / f"{preset.name}-{preset.image_size}-{first_seed}-{count}"
    if not (path / _MARKER).is_file():
        shape = (count, preset.image_size, preset.image_size)
        with new_directory(path, _MARKER) as partial:
            np.lib.format.open_memmap(partial / _IMAGES, "w+", np.uint8, (*shape, 3))
            np.lib.format.open_memmap(partial / _INSTANCE_MAP, "w+", np.uint8, shape)
            render = functools.partial(_render, preset, first_seed, partial)
            starts = range(0, count, _SCENES_PER_TASK)
            tasks = [range(count)[start : start + _SCENES_PER_TASK] for start in starts]
            if num_workers:
                with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
                    objects = list(chain.from_iterable(pool.map(render, tasks)))
            else:
                objects = list(chain.from_iterable(map(render, tasks)))
            (partial / _MARKER).write_bytes(msgspec.json.encode(objects))
    return StoredScenes(
        np.load(path / _IMAGES, mmap_mode="r"),
        np.load(path / _INSTANCE_MAP, mmap_mode="r"),
        msgspec.json.decode((path / _MARKER).read_bytes(), type=list[tuple[SceneObject, ...]]),
    )


def _render(
    preset: Preset, first_seed: int, folder: Path, indices: range
) -> list[tuple[SceneObject, ...]]:
    """Render scenes into the files of a folder; return their objects."""
    images = np.load(folder / _IMAGES, mmap_mode="r+")
    instance_map = np.load(folder / _INSTANCE_MAP, mmap_mode="r+")
    objects = []
    for index in indices:
        scene = make_scene(preset, first_seed + index)
        images[index], instance_map[index] = scene.image, scene.instance_map
        objects.append(scene.objects)
    images.flush()
    instance_map.flush()
    return objects


class SceneSource:
    """Training batches of stored scenes, in an order that is shuffled in each epoch.

    Args:
        preset: difficulty preset of the scenes.
        scenes: stored scenes.
        seed: seed of the order and the questions.
    """

    def __init__(self, preset: Preset, scenes: StoredScenes, seed: int) -> None:
        self.preset = preset
        self.scenes = scenes
        self._seed = seed
        self._order = EpochOrder(len(scenes), seed)

    def indices(self, step: int, global_batch_size: int, rank: int, num_ranks: int) -> list[int]:
        """Return the scenes of one process in one step; the processes share the batch."""
        first = step * global_batch_size
        return [self._order[first + offset] for offset in range(rank, global_batch_size, num_ranks)]

    def batch(self, indices: Sequence[int]) -> SceneBatch:
        """Collect scenes as tensors."""
        scenes, values = self.scenes, attribute_values(self.preset)
        rows = [scenes.objects[i] for i in indices]
        most = self.preset.num_objects[1]
        attributes = np.zeros((len(rows), most, len(values)), np.int64)
        centers = np.zeros((len(rows), most, 2), np.float32)
        for row, objects in enumerate(rows):
            for number, item in enumerate(objects):
                attributes[row, number] = [
                    known.index(getattr(item, name)) for name, known in values.items()
                ]
                centers[row, number] = item.center
        return SceneBatch(
            torch.from_numpy(np.stack([scenes.images[i] for i in indices])),
            torch.from_numpy(np.stack([scenes.instance_map[i] for i in indices])),
            torch.from_numpy(attributes),
            torch.from_numpy(centers),
            torch.tensor([len(objects) for objects in rows]),
        )

    def questions(
        self, index: int, step: int, count: int, question_type_weights: Mapping[str, float]
    ) -> list[Question]:
        """Generate up to ``count`` questions about a scene; other questions in each step.

        Empty ``question_type_weights`` take those of the preset.
        """
        seed = (self._seed * 1_000_003 + step) * 1_000_003 + index
        preset = with_question_types(self.preset, question_type_weights)
        return ask_questions(self.scenes.scene(index), preset, seed, count)

    def generator(self, step: int, index: int) -> np.random.Generator:
        """Return the random generator of one scene in one step, the same in every process."""
        return np.random.default_rng([self._seed, step, index])


def attribute_values(preset: Preset) -> dict[str, Sequence[Any]]:
    """Return the known values of each attribute, in the order of ``SceneBatch.attributes``."""
    grid = range(1, vocabulary.GRID_SIZE + 1)
    return {
        "shape": preset.shapes,
        "color": list(vocabulary.COLORS),
        "texture": preset.textures,
        "size": vocabulary.SIZES,
        "row": grid,
        "column": grid,
    }


def corpus(preset: Preset) -> list[str]:
    """Return instructions and responses to train the tokenizer on."""
    texts = [f" row{n} col{n}" for n in range(1, vocabulary.GRID_SIZE + 1)] * 50
    texts += [f" {thing}" for thing in preset.things] * 50
    blank = np.zeros((1, 1, 3), np.uint8)
    for index in range(_CORPUS_SCENES):
        scene = make_scene(preset, HELD_OUT_SEED - 1 - index)
        without_image = Scene(blank, scene.instance_map, scene.objects)
        for question in ask_questions(without_image, preset, index, 4):
            texts += [question.instruction, question.response]
    return texts


def target_masks(scenes: SceneBatch, rows: Tensor, targets: Tensor) -> Tensor:
    """Return the visible pixels of the target objects, (N, S, S) bool."""
    return scenes.instance_map[rows] == (targets + 1)[:, None, None]


def policy_pixels(images: Tensor, image_processor: Any) -> Tensor:
    """Normalize pixels as the policy's image processor does."""
    return _normalize(images, image_processor.image_mean, image_processor.image_std, 255)


def segmentation_pixels(images: Tensor, geometry: Geometry) -> Tensor:
    """Normalize pixels as :func:`coprs_deploy.images.prepare_image` does."""
    return _normalize(images, geometry.pixel_mean, geometry.pixel_std)


def _normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], scale: int = 1
) -> Tensor:
    """Normalize uint8 (B, S, S, 3) to float32 (B, 3, S, S); mean and std times scale in 0..255."""
    offset, divisor = (scale * torch.tensor(each, device=images.device) for each in (mean, std))
    return ((images.float() - offset) / divisor).permute(0, 3, 1, 2)
