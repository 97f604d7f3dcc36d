"""Scenes and questions as examples, made when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import msgspec

from coprs_deploy.data.examples import Example
from coprs_deploy.data.synthetic.presets import HELD_OUT_SEED, Preset
from coprs_deploy.data.synthetic.questions import Question, ask
from coprs_deploy.data.synthetic.scene import Scene, make_scene


def held_out_examples(tier: Preset, count: int, absent: int, first_seed: int = 0) -> list[Example]:
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


class SceneExamples(Sequence[Example]):
    """One example a seed, without a file: the same interface as an example file."""

    def __init__(self, tier: Preset, num_examples: int, first_seed: int = 0) -> None:
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


def example_from_question(scene: Scene, question: Question, tier: Preset, seed: int) -> Example:
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


def with_kinds(tier: Preset, kinds: Mapping[str, float]) -> Preset:
    """Exchange the weights of a tier's kinds of question; empty ones leave it as it is."""
    return msgspec.structs.replace(tier, kinds=dict(kinds)) if kinds else tier
