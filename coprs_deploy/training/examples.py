"""Training and held-out examples of a run, checked as a whole before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coprs_deploy.data.examples import Example
from coprs_deploy.data.image_checks import content_key
from coprs_deploy.data.readers.registry import open_source
from coprs_deploy.data.synthetic.examples import SceneExamples, held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.features import FeatureStore
from coprs_deploy.training.recipe import Recipe
from coprs_deploy.training.settings import (
    GrpoSettings,
    StageSettings,
    SupervisedSettings,
    SyntheticData,
)

NAMED_EXAMPLES = 5
"""Examples that an error names."""


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
    """Opened data of a recipe; ``contents`` has the number of examples and a hash of each set."""

    training: Sequence[Example]
    held_out: Sequence[Example]
    features: FeatureStore | None = None
    contents: dict[str, dict[str, Any]] = field(default_factory=dict)


def open_data(recipe: Recipe) -> OpenedData:
    """Open files, data sets or generated scenes, and check every example against the stages.

    Raises:
        ValueError: examples have too many targets or no response for a stage, or no embedding.
        ArtifactError: a file cannot be used.
    """
    data = recipe.data
    if isinstance(data, SyntheticData):
        preset = PRESETS[data.preset]
        _check_targets(recipe, f"data.preset {data.preset}", {data.preset: preset.max_targets})
        return OpenedData(
            SceneExamples(preset, data.num_training_scenes),
            held_out_examples(preset, data.num_held_out_scenes, data.num_no_match_scenes),
        )
    features = FeatureStore(data.features) if data.features else None
    files, contents = {}, {}
    for name in ("training", "held_out"):
        path = getattr(data, name)
        contained = Contents(features)
        files[name] = open_source(path, inspect=contained.add)
        _check_targets(recipe, path, contained.num_targets)
        _check_responses(recipe, path, contained.without_response)
        if features is not None and contained.without_embedding:
            raise ValueError(
                f"{path}: {_named(contained.without_embedding)} no embedding in {features.path}; "
                f"add them with `coprs-deploy features CHECKPOINT {path} --out {features.path}`"
            )
        contents[f"data.{name}"] = {"examples": len(files[name]), "hash": contained.hexdigest()}
    return OpenedData(files["training"], files["held_out"], features, contents)


class Contents:
    """What a set of examples holds: a hash of all of it, and what stages may have to refuse.

    Attributes:
        num_targets: number of targets by the id of the example, from two targets on.
        without_response: ids of examples without a response.
        without_embedding: ids of examples whose image has no embedding.
    """

    def __init__(self, features: FeatureStore | None = None) -> None:
        self._features, self._hash = features, hashlib.sha256()
        self.num_targets: dict[str, int] = {}
        self.without_response: list[str] = []
        self.without_embedding: list[str] = []

    def add(self, example: Example) -> None:
        """Add an example."""
        key = content_key(example.image)
        texts = [key, example.instruction, example.response, len(example.masks)]
        self._hash.update(json.dumps(texts).encode())
        self._hash.update(np.packbits(example.masks).data)
        if len(example.masks) > 1:
            self.num_targets[example.id] = len(example.masks)
        if not example.response:
            self.without_response.append(example.id)
        if self._features is not None and key not in self._features:
            self.without_embedding.append(example.id)

    def hexdigest(self) -> str:
        """Return the hash of images, instructions, masks and responses, in their order."""
        return self._hash.hexdigest()


def _check_targets(recipe: Recipe, where: str, num_targets: dict[str, int]) -> None:
    for name, settings in _stages(recipe, GrpoSettings):
        assert isinstance(settings, GrpoSettings)
        above = [key for key, count in num_targets.items() if count > settings.max_targets]
        if above:
            most = max(num_targets.values())
            raise ValueError(
                f"stages.{name}.max_targets is {settings.max_targets}; {where}: {_named(above)} "
                f"more targets, up to {most}; set stages.{name}.max_targets={most}, or remove them"
            )


def _check_responses(recipe: Recipe, where: str, without_response: list[str]) -> None:
    for name, settings in _stages(recipe, SupervisedSettings):
        assert isinstance(settings, SupervisedSettings)
        if without_response and not settings.allow_missing_responses:
            raise ValueError(
                f"{where}: {_named(without_response)} no response, and stage {name} would teach an "
                "answer without reasoning; add responses, or set "
                f"stages.{name}.allow_missing_responses=true to train on <REF_POS> alone"
            )


def _stages(recipe: Recipe, kind: type[StageSettings]) -> list[tuple[str, StageSettings]]:
    return [(name, each) for name, each in recipe.stages.items() if isinstance(each, kind)]


def _named(ids: Sequence[str]) -> str:
    """Count and name examples, with a verb."""
    more = ", ..." if len(ids) > NAMED_EXAMPLES else ""
    verb = "example has" if len(ids) == 1 else "examples have"
    return f"{len(ids)} {verb} ({', '.join(ids[:NAMED_EXAMPLES])}{more})"
