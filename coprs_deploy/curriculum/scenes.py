"""Generated scenes as training batches: pictures kept on disk, questions asked on the fly.

What a step sees is a function of the seed and the number of the step alone, so a run that was
killed goes on with the very batch that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial as partial_function
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


def target_masks(scenes: SceneBatch, rows: Tensor, targets: Tensor) -> Tensor:
    """Return the visible pixels of chosen objects, (N, S, S) bool."""
    return scenes.instance_map[rows] == (targets + 1)[:, None, None]


ATTRIBUTES = ("shape", "color", "texture", "size", "row", "column")
"""What the table of a batch holds of each object, in this order."""


_MARKER, _IMAGES, _INSTANCE_MAP = "scenes.json", "images.npy", "instance_map.npy"


_DRAWN_AT_ONCE = 500


class SceneBatch(NamedTuple):
    """Some scenes as tensors.

    Attributes:
        images: uint8 (B, S, S, 3) RGB.
        instance_map: uint8 (B, S, S); 0 is background, n the pixel of object n - 1.
        attributes: int64 (B, M, 6), numbers of ``ATTRIBUTES``, from 0; 0 beyond the last object.
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
    """Scenes on disk, mapped into memory.

    Attributes:
        images: uint8 (N, S, S, 3).
        instance_map: uint8 (N, S, S).
        objects: the table of each scene.
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
    preset: Preset, first_seed: int, count: int, folder: Path, workers: int = 0
) -> StoredScenes:
    """Draw scenes of consecutive seeds into a folder, unless they lie there already.

    Args:
        preset: their world.
        first_seed: seed of the first.
        count: how many.
        folder: where the folder of all such files is, or shall be.
        workers: processes that draw them; 0 draws them in this one.
    """
    path = folder / f"{preset.name}-{preset.image_size}-{first_seed}-{count}"
    if not (path / _MARKER).is_file():
        shape = (count, preset.image_size, preset.image_size)
        with new_directory(path, _MARKER) as partial:
            np.lib.format.open_memmap(partial / _IMAGES, "w+", np.uint8, (*shape, 3))
            np.lib.format.open_memmap(partial / _INSTANCE_MAP, "w+", np.uint8, shape)
            draw = partial_function(_draw, preset, first_seed, partial)
            parts = [
                range(i, min(i + _DRAWN_AT_ONCE, count)) for i in range(0, count, _DRAWN_AT_ONCE)
            ]
            if workers:
                with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                    tables = list(chain.from_iterable(pool.map(draw, parts)))
            else:
                tables = list(chain.from_iterable(map(draw, parts)))
            (partial / _MARKER).write_bytes(msgspec.json.encode(tables))
    return StoredScenes(
        np.load(path / _IMAGES, mmap_mode="r"),
        np.load(path / _INSTANCE_MAP, mmap_mode="r"),
        msgspec.json.decode((path / _MARKER).read_bytes(), type=list[tuple[SceneObject, ...]]),
    )


def _draw(
    preset: Preset, first_seed: int, folder: Path, indices: range
) -> list[tuple[SceneObject, ...]]:
    """Draw some scenes into the files of a folder; return what is in each."""
    images = np.load(folder / _IMAGES, mmap_mode="r+")
    instance_map = np.load(folder / _INSTANCE_MAP, mmap_mode="r+")
    tables = []
    for index in indices:
        scene = make_scene(preset, first_seed + index)
        images[index], instance_map[index] = scene.image, scene.instance_map
        tables.append(scene.objects)
    images.flush()
    instance_map.flush()
    return tables


class SceneSource:
    """Training batches in an order that is shuffled afresh in each epoch.

    Args:
        preset: the world of the scenes.
        scenes: scenes of that tier.
        seed: of the order and the questions.
    """

    def __init__(self, preset: Preset, scenes: StoredScenes, seed: int) -> None:
        self.preset = preset
        self.scenes = scenes
        self._seed = seed
        self._order = EpochOrder(len(scenes), seed)

    def indices(self, step: int, global_batch_size: int, rank: int, num_ranks: int) -> list[int]:
        """Choose the scenes of one process in one step; all processes together take the batch."""
        first = step * global_batch_size
        return [self._order[first + offset] for offset in range(rank, global_batch_size, num_ranks)]

    def batch(self, indices: Sequence[int]) -> SceneBatch:
        """Collect scenes as tensors."""
        return collect_scenes(self.preset, self.scenes, indices)

    def questions(
        self, index: int, step: int, count: int, question_type_weights: Mapping[str, float]
    ) -> list[Question]:
        """Ask about a scene; other questions in each step.

        Args:
            index: of the scene.
            step: of the run.
            count: how many at most.
            question_type_weights: weight of each kind of question; empty takes the tier's own.
        """
        seed = (self._seed * 1_000_003 + step) * 1_000_003 + index
        return ask_questions(
            self.scenes.scene(index),
            with_question_types(self.preset, question_type_weights),
            seed,
            count,
        )

    def generator(self, step: int, index: int) -> np.random.Generator:
        """Return the random numbers of one scene in one step, in whichever process it falls."""
        return np.random.default_rng([self._seed, step, index])


def collect_scenes(preset: Preset, scenes: StoredScenes, indices: Sequence[int]) -> SceneBatch:
    """Collect some scenes as tensors."""
    rows = [scenes.objects[i] for i in indices]
    attributes = np.zeros((len(rows), preset.num_objects[1], len(ATTRIBUTES)), np.int64)
    centers = np.zeros((len(rows), preset.num_objects[1], 2), np.float32)
    for row, objects in enumerate(rows):
        for number, item in enumerate(objects):
            attributes[row, number] = encode_object(preset, item)
            centers[row, number] = item.center
    return SceneBatch(
        torch.from_numpy(np.stack([scenes.images[i] for i in indices])),
        torch.from_numpy(np.stack([scenes.instance_map[i] for i in indices])),
        torch.from_numpy(attributes),
        torch.from_numpy(centers),
        torch.tensor([len(objects) for objects in rows]),
    )


def encode_object(preset: Preset, item: SceneObject) -> tuple[int, ...]:
    """Number the attributes of an object as ``ATTRIBUTES`` lists them."""
    return (
        preset.shapes.index(item.shape),
        list(vocabulary.COLORS).index(item.color),
        preset.textures.index(item.texture),
        vocabulary.SIZES.index(item.size),
        item.row - 1,
        item.column - 1,
    )


def attribute_sizes(preset: Preset) -> tuple[int, ...]:
    """Count the values of each attribute."""
    grid = vocabulary.GRID_SIZE
    return (
        len(preset.shapes),
        len(vocabulary.COLORS),
        len(preset.textures),
        len(vocabulary.SIZES),
        grid,
        grid,
    )


def corpus(preset: Preset, seed: int = 0, num_scenes: int = 2000) -> list[str]:
    """Write instructions and responses for the tokenizer to learn its words from."""
    words = [f" row{n} col{n}" for n in range(1, vocabulary.GRID_SIZE + 1)] * 50
    words += [f" {thing}" for thing in preset.things] * 50
    blank = np.zeros((1, 1, 3), np.uint8)
    for index in range(num_scenes):
        scene = make_scene(preset, HELD_OUT_SEED - 1 - index)
        lean = Scene(blank, scene.instance_map, scene.objects)
        for question in ask_questions(lean, preset, seed + index, 4):
            words += [question.instruction, question.response]
    return words


def normalize_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 (B, S, S, 3) into normalized (B, 3, S, S); mean and std in 0..255."""
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def policy_pixels(images: Tensor, image_processor: Any) -> Tensor:
    """Normalize pixels as the policy's image processor does."""
    mean = torch.tensor(image_processor.image_mean, device=images.device)
    std = torch.tensor(image_processor.image_std, device=images.device)
    return normalize_pixels(images, 255 * mean, 255 * std)


def segmentation_pixels(images: Tensor, geometry: Geometry) -> Tensor:
    """Normalize pixels as :func:`coprs_deploy.images.prepare_image` does."""
    mean = torch.tensor(geometry.pixel_mean, device=images.device)
    std = torch.tensor(geometry.pixel_std, device=images.device)
    return normalize_pixels(images, mean, std)
