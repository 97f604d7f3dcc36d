"""Which questions a finished model is judged on: held-out scenes, or a file of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coprs_deploy.training.examples import Example, ExampleFile
from coprs_deploy.training.scene_source import with_kinds
from coprs_deploy.training.scenes.dataset import SceneExamples
from coprs_deploy.training.scenes.tiers import HELD_OUT_SEED, TIERS, Tier

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
    if tier not in TIERS:
        raise ValueError(f"--tier is {tier!r}; accepted: {', '.join(TIERS)}")
    if absent < 0:
        raise ValueError(f"--absent is {absent}; it must be at least 0")
    if first_seed < 0:
        raise ValueError(f"--first-seed is {first_seed}; it must be at least 0")
    world, number = TIERS[tier], count or DEFAULT_SCENES
    examples = held_out_examples(world, number, absent, first_seed)
    words = f"{number} held-out {tier} scenes, and {absent} asked about what is not there"
    if first_seed:
        words += f", from seed {first_seed} on"
    return ChosenExamples(words, examples, world.max_targets)


def held_out_examples(tier: Tier, count: int, absent: int, first_seed: int = 0) -> list[Example]:
    """Ask a question with an answer about each of some scenes, and others without one.

    The kinds of question are asked equally often, whatever the tier's own weights.
    """
    present = with_kinds(tier, dict.fromkeys((k for k in tier.kinds if k != "none"), 1.0))
    first = HELD_OUT_SEED + first_seed
    examples = list(SceneExamples(present, count, first))
    if absent:
        nothing = with_kinds(tier, {"none": 1.0})
        examples += SceneExamples(nothing, absent, first + count)
    return examples
