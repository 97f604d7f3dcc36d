"""Scenes and questions as examples, made when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from coprs_deploy.training.examples import Example
from coprs_deploy.training.scenes.generator import make_scene
from coprs_deploy.training.scenes.questions import Question, ask
from coprs_deploy.training.scenes.scene import Scene
from coprs_deploy.training.scenes.tiers import HELD_OUT_SEED, Tier


class SceneExamples(Sequence[Example]):
    """One example a seed, without a file: the same interface as an example file."""

    def __init__(self, tier: Tier, num_examples: int, first_seed: int = 0) -> None:
        """Take ``num_examples`` seeds from ``first_seed`` on.

        Raises:
            ValueError: there is no example, or the seeds reach from training into held-out ones.
        """
        if num_examples < 1:
            raise ValueError(f"num_examples is {num_examples}; it must be at least 1")
        if first_seed < HELD_OUT_SEED < first_seed + num_examples:
            raise ValueError(
                f"the seeds {first_seed}..{first_seed + num_examples - 1} pass {HELD_OUT_SEED}, "
                "where held-out scenes begin: take them from one side"
            )
        self.tier = tier
        self.seeds = range(first_seed, first_seed + num_examples)

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        seed = self.seeds[index]
        scene = make_scene(self.tier, seed)
        return example_from_question(scene, ask(scene, self.tier, seed)[0], self.tier, seed)


def example_from_question(scene: Scene, question: Question, tier: Tier, seed: int) -> Example:
    """Join a scene and one of its questions to an example; masks follow the reading order."""
    return Example(
        id=f"{tier.name}-{seed}",
        image=scene.image,
        instruction=question.instruction,
        masks=scene.masks(question.targets),
        response=question.response,
        kind=question.kind,
        tier=tier.name,
    )
