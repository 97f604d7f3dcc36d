"""Training and held-out examples of a run, checked as a whole before the first step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from coprs_deploy.data.examples import Example, ExampleSource
from coprs_deploy.data.image_checks import ImageChecks, content_key
from coprs_deploy.data.readers.registry import open_source
from coprs_deploy.data.selection import Selection
from coprs_deploy.data.synthetic.examples import SceneExamples, held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.images import MAX_ASPECT_RATIO
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.planning.problems import Problem, named, reporting, row_problems
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import (
    GrpoSettings,
    StageSettings,
    SupervisedSettings,
    SyntheticData,
)


@dataclass(frozen=True)
class ExampleSets:
    """Training and held-out examples, the seed of their order, and how images are prepared."""

    training: Sequence[Example]
    held_out: Sequence[Example]
    vision: VisionProcessor
    seed: int
    features: FeatureStore | None = None


@dataclass(frozen=True)
class OpenedData:
    """Opened data of a recipe; ``contents`` has what sets on disk hold, by key of the recipe."""

    training: Sequence[Example]
    held_out: Sequence[Example]
    features: FeatureStore | None = None
    contents: dict[str, Contents] = field(default_factory=dict)


def first_examples(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """Return the first examples, those of a file not decoded."""
    if isinstance(examples, ExampleSource):
        return Selection(examples, range(min(count, len(examples))))
    return examples[:count]


Progress = Callable[[str, int, int], None]
"""Callback with the name of a set, and the numbers of examples that are checked and of all."""


def open_data(
    recipe: Recipe,
    problems: list[Problem],
    cache: Path | None = None,
    on_progress: Progress = lambda name, done, total: None,
) -> OpenedData | None:
    """Open files, data sets or generated scenes, and check every example against the stages.

    Args:
        recipe: the recipe.
        problems: receives what is wrong with the data.
        cache: file of the images that an earlier check decoded; written if its folder exists.
        on_progress: callback after each example.

    Returns:
        The data; None if a part of them cannot be opened.
    """
    data = recipe.data
    if isinstance(data, SyntheticData):
        preset = PRESETS[data.preset]
        problems += _target_problems(recipe, "data.preset", {data.preset: preset.max_targets})
        return OpenedData(
            SceneExamples(preset, data.num_training_scenes),
            held_out_examples(preset, data.num_held_out_scenes, data.num_no_match_scenes),
        )
    features = None
    if data.features:
        with reporting(problems, "data.features"):
            features = FeatureStore(data.features)
    images = ImageChecks(cache)
    opened: dict[str, Sequence[Example]] = {}
    contents: dict[str, Contents] = {}
    for name in ("training", "held_out"):
        key = f"data.{name}"
        contents[key] = contained = Contents(features)
        with reporting(problems, key):
            source = _open(getattr(data, name), contained, images, partial(on_progress, key))
            opened[name] = source
            problems += row_problems(key, source)
        problems += _target_problems(recipe, key, contained.num_targets)
        problems += _response_problems(recipe, key, contained.without_response)
        problems += _image_problems(key, contained, getattr(data, name), features)
    if cache is not None and cache.parent.is_dir():
        images.save(cache)
    if len(opened) < 2 or (data.features and features is None):
        return None
    return OpenedData(opened["training"], opened["held_out"], features, contents)


def _open(
    path: str, contents: Contents, images: ImageChecks, on_progress: Callable[[int, int], None]
) -> ExampleSource:
    """Open a source and check all of its examples; what is left out is no warning here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return open_source(path, inspect=contents.add, load=images, on_progress=on_progress)


class Contents:
    """What a set of examples holds: a hash of each one, and what stages may have to refuse.

    Attributes:
        rows: id and hash of each example: its image, instruction, masks and response.
        num_targets: number of targets by the id of the example, from two targets on.
        without_response: ids of examples without a response.
        without_embedding: ids of examples whose image has no embedding.
        too_long: ids of examples whose image no policy accepts.
    """

    def __init__(self, features: FeatureStore | None = None) -> None:
        self._features = features
        self.rows: list[tuple[str, str]] = []
        self.num_targets: dict[str, int] = {}
        self.without_response: list[str] = []
        self.without_embedding: list[str] = []
        self.too_long: list[str] = []

    def add(self, example: Example) -> None:
        """Add an example, whose image may be a stand-in."""
        key, (height, width) = content_key(example.image), example.image.shape[:2]
        texts = [key, example.instruction, example.response, len(example.masks)]
        digest = xxhash.xxh3_128(json.dumps(texts).encode())
        digest.update(np.ascontiguousarray(example.masks).view(np.uint8).data)
        if example.ignore_mask is not None:
            digest.update(np.ascontiguousarray(example.ignore_mask).view(np.uint8).data)
        self.rows.append((example.id, digest.hexdigest()))
        if len(example.masks) > 1:
            self.num_targets[example.id] = len(example.masks)
        if not example.response:
            self.without_response.append(example.id)
        if self._features is not None and key not in self._features:
            self.without_embedding.append(example.id)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            self.too_long.append(example.id)

    def hexdigest(self) -> str:
        """Return the hash of all examples in their order; ids do not count."""
        return xxhash.xxh3_128("".join(digest for _, digest in self.rows).encode()).hexdigest()


def _target_problems(recipe: Recipe, where: str, num_targets: dict[str, int]) -> Iterator[Problem]:
    for name, settings in _stages(recipe, GrpoSettings):
        assert isinstance(settings, GrpoSettings)
        above = [key for key, count in num_targets.items() if count > settings.max_targets]
        if above:
            most = max(num_targets.values())
            yield Problem(
                where,
                f"{named(above)} more targets than stages.{name}.max_targets = "
                f"{settings.max_targets}, up to {most}; set stages.{name}.max_targets={most}, or "
                "remove them",
            )


def _response_problems(recipe: Recipe, where: str, without: list[str]) -> Iterator[Problem]:
    for name, settings in _stages(recipe, SupervisedSettings):
        assert isinstance(settings, SupervisedSettings)
        if without and not settings.allow_missing_responses:
            yield Problem(
                where,
                f"{named(without)} no response, and stage {name} would teach an answer without "
                f"reasoning; add responses, or set stages.{name}.allow_missing_responses=true to "
                "train on <REF_POS> alone",
            )


def _image_problems(
    where: str, contents: Contents, path: str, features: FeatureStore | None
) -> Iterator[Problem]:
    if contents.too_long:
        yield Problem(
            where,
            f"{named(contents.too_long)} an image with an aspect ratio above {MAX_ASPECT_RATIO}, "
            "which no policy accepts; crop or pad it",
        )
    yield from embedding_problems(where, contents, path, features)


def embedding_problems(
    where: str, contents: Contents, path: str, features: FeatureStore | None
) -> Iterator[Problem]:
    """Find images of a source that have no precomputed embedding."""
    if features is not None and contents.without_embedding:
        yield Problem(
            where,
            f"{named(contents.without_embedding)} no embedding in {features.path}; add them with "
            f"`coprs-deploy features CHECKPOINT {path} --out {features.path}`",
        )


def _stages(recipe: Recipe, kind: type[StageSettings]) -> list[tuple[str, StageSettings]]:
    return [(name, each) for name, each in recipe.stages.items() if isinstance(each, kind)]
