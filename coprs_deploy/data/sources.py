"""Sources of examples for evaluation: held-out synthetic scenes, public data sets, or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.data.examples import Example, ExampleFile, ExampleSource
from coprs_deploy.data.readers.registry import SourceOptions, open_source, require_images
from coprs_deploy.data.selection import Selection
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS

SYNTHETIC = "synthetic:"
"""Prefix of a source that names a preset, as in ``synthetic:plain``."""

DEFAULT_NUM_SCENES = 256
DEFAULT_NUM_NO_MATCH = 64


@dataclass(frozen=True)
class ExampleSet:
    """Examples with a description.

    Attributes:
        description: source and number of the examples, for reports.
        examples: the examples.
        max_targets: maximum number of targets of one example.
        question_types: question types of the examples with a target.
        num_no_match: number of examples without a target.
    """

    description: str
    examples: Sequence[Example]
    max_targets: int
    question_types: tuple[str, ...]
    num_no_match: int

    def to_json(self) -> dict[str, Any]:
        """Return the description, and of a source on disk the skipped rows."""
        source = self.examples.to_json() if isinstance(self.examples, ExampleSource) else {}
        return {"dataset": self.description, **source}


def open_examples(
    source: str | Path,
    num_examples: int | None = None,
    num_no_match: int = DEFAULT_NUM_NO_MATCH,
    first_seed: int = 0,
    options: SourceOptions | None = None,
) -> ExampleSet:
    """Open the examples of a source.

    Args:
        source: ``synthetic:PRESET`` for held-out scenes, or a name or path as in
            :mod:`coprs_deploy.data.readers.registry`.
        num_examples: number of scenes with a target, by default 256; of other sources the first
            examples, by default all.
        num_no_match: number of additional no-match scenes; used for scenes only.
        first_seed: seed of the first held-out scene, counted from 0; used for scenes only.
        options: root of the data sets and folder of the images; not used for scenes.

    Raises:
        ValueError: the preset, name or split is unknown, or a number is too small.
        FileNotFoundError: the file does not exist.
        ArtifactError: the source cannot be read, has no valid example, or lacks images.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; it must be at least 1")
    if str(source).startswith(SYNTHETIC):
        preset = str(source).removeprefix(SYNTHETIC)
        return _open_scenes(preset, num_examples or DEFAULT_NUM_SCENES, num_no_match, first_seed)
    examples = open_source(source, options, max_examples=num_examples)
    require_images(examples)
    if num_examples is not None and len(examples) > num_examples:
        examples = Selection(examples, range(num_examples))
    name = examples.path.name if isinstance(examples, ExampleFile) else examples.description
    description = f"{len(examples)} examples of {name}"
    if examples.problems:
        description += f", {len(examples.problems)} skipped"
    pairs = zip(examples.question_types, examples.num_targets, strict=True)
    types = tuple(question_type for question_type, num_targets in pairs if num_targets)
    most = max([1, *examples.num_targets])
    return ExampleSet(description, examples, most, types, len(examples) - len(types))


def _open_scenes(name: str, num_examples: int, num_no_match: int, first_seed: int) -> ExampleSet:
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; accepted: {', '.join(PRESETS)}")
    for field, number in (("num_no_match", num_no_match), ("first_seed", first_seed)):
        if number < 0:
            raise ValueError(f"{field} is {number}; it must be at least 0")
    preset = PRESETS[name]
    description = f"{num_examples} held-out {name} scenes and {num_no_match} no-match scenes"
    if first_seed:
        description += f", first seed {first_seed}"
    examples = held_out_examples(preset, num_examples, num_no_match, first_seed)
    types = tuple(example.question_type for example in examples if len(example.masks))
    num_without = len(examples) - len(types)
    return ExampleSet(description, examples, preset.max_targets, types, num_without)
