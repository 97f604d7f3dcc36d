"""Which questions a finished model is judged on: held-out scenes, or a file of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.data.examples import Example, ExampleFile
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS

DEFAULT_SCENES = 256


@dataclass(frozen=True)
class ChosenExamples:
    """Questions with their truth.

    Attributes:
        description: where they come from, in words.
        examples: one question each.
        max_targets: most targets of one of them.
    """

    description: str
    examples: Sequence[Example]
    max_targets: int


def choose_examples(
    file: Path | None, tier: str, count: int | None, absent: int, first_seed: int = 0
) -> ChosenExamples:
    """Choose what is asked.

    Args:
        file: of examples; None takes held-out scenes.
        tier: world of the scenes.
        count: how many questions; None takes 256 scenes, or the whole file.
        absent: how many more scenes are asked about something that is not there.
        first_seed: seed of the first held-out scene; reports of training begin at 0.

    Raises:
        ValueError: there is no such tier, or a number is too small.
        ArtifactError: the file cannot be read.
    """
    if count is not None and count < 1:
        raise ValueError(f"--count is {count}; it must be at least 1")
    if file is not None:
        everything = ExampleFile(file)
        taken = everything[: count if count is not None else len(everything)]
        if not taken:
            raise ValueError(f"{file} holds no good example")
        most = max(1, *(len(example.masks) for example in taken))
        return ChosenExamples(f"{len(taken)} examples of {file.name}", taken, most)
    if tier not in PRESETS:
        raise ValueError(f"--tier is {tier!r}; accepted: {', '.join(PRESETS)}")
    if absent < 0:
        raise ValueError(f"--absent is {absent}; it must be at least 0")
    if first_seed < 0:
        raise ValueError(f"--first-seed is {first_seed}; it must be at least 0")
    world, number = PRESETS[tier], count or DEFAULT_SCENES
    examples = held_out_examples(world, number, absent, first_seed)
    words = f"{number} held-out {tier} scenes, and {absent} asked about what is not there"
    if first_seed:
        words += f", from seed {first_seed} on"
    return ChosenExamples(words, examples, world.max_targets)
