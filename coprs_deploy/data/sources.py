"""Sources of examples for evaluation: held-out synthetic scenes, or an example file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coprs_deploy.data.examples import Example, ExampleFile
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
        """Return the description, and of a file the skipped rows and ignored columns."""
        file = self.examples.to_json() if isinstance(self.examples, ExampleFile) else {}
        return {"dataset": self.description, **file}


def open_examples(
    source: str | Path,
    num_examples: int | None = None,
    num_no_match: int = DEFAULT_NUM_NO_MATCH,
    first_seed: int = 0,
) -> ExampleSet:
    """Open the examples of a source.

    Args:
        source: path of an example file, or ``synthetic:PRESET`` for held-out scenes.
        num_examples: number of examples with a target; None is 256 scenes, or the whole file.
        num_no_match: number of additional no-match scenes; not used for a file.
        first_seed: seed of the first held-out scene, counted from 0; not used for a file.

    Raises:
        ValueError: the preset is unknown, or a number is too small.
        FileNotFoundError: the file does not exist.
        ArtifactError: the file cannot be read, or has no valid example.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; it must be at least 1")
    if str(source).startswith(SYNTHETIC):
        preset = str(source).removeprefix(SYNTHETIC)
        return _open_scenes(preset, num_examples or DEFAULT_NUM_SCENES, num_no_match, first_seed)
    file = ExampleFile(source, num_examples)
    description = f"{len(file)} examples of {file.path.name}"
    if file.problems:
        description += f", {len(file.problems)} skipped"
    pairs = zip(file.question_types, file.num_targets, strict=True)
    types = tuple(question_type for question_type, num_targets in pairs if num_targets)
    most = max(1, *file.num_targets)
    return ExampleSet(description, file, most, types, len(file) - len(types))


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
