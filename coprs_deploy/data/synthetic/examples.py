"""Examples of synthetic scenes, generated on access."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from coprs_deploy.data.examples import Example, LazyExamples
from coprs_deploy.data.synthetic.presets import HELD_OUT_SEED, Preset
from coprs_deploy.data.synthetic.questions import Question, ask_questions
from coprs_deploy.data.synthetic.scene import Scene, make_scene


def held_out_examples(
    preset: Preset, num_examples: int, num_no_match: int, first_seed: int = 0
) -> list[Example]:
    """Generate held-out examples with a target, and no-match examples after them.

    Question types with a target are equally likely, whatever the weights of the preset.
    ``first_seed`` is counted from ``HELD_OUT_SEED``.
    """
    first = HELD_OUT_SEED + first_seed
    examples = list(SceneExamples(preset_with_target(preset), num_examples, first))
    if num_no_match:
        no_match = with_question_types(preset, {"none": 1.0})
        examples += SceneExamples(no_match, num_no_match, first + num_examples)
    return examples


class SceneExamples(LazyExamples):
    """One generated example per seed, with the interface of an example file."""

    def __init__(self, preset: Preset, num_examples: int, first_seed: int = 0) -> None:
        """Use ``num_examples`` consecutive seeds from ``first_seed``.

        Raises:
            ValueError: num_examples is below 1, or the seeds include both training and held-out
                seeds.
        """
        if num_examples < 1:
            raise ValueError(f"num_examples is {num_examples}; it must be at least 1")
        if first_seed < HELD_OUT_SEED < first_seed + num_examples:
            raise ValueError(
                f"the seeds {first_seed}..{first_seed + num_examples - 1} include "
                f"{HELD_OUT_SEED}, where held-out scenes begin; use seeds of one side only"
            )
        self.preset = preset
        self.seeds = range(first_seed, first_seed + num_examples)

    def __len__(self) -> int:
        return len(self.seeds)

    def load(self, index: int) -> Example:
        """Generate the example of an index."""
        seed = self.seeds[index]
        scene = make_scene(self.preset, seed)
        question = ask_questions(scene, self.preset, seed)[0]
        return example_from_question(scene, question, self.preset, str(seed))


def example_from_question(scene: Scene, question: Question, preset: Preset, name: str) -> Example:
    """Build the example ``PRESET-NAME`` of a scene and one of its questions."""
    return Example(
        id=f"{preset.name}-{name}",
        image=scene.image,
        instruction=question.instruction,
        masks=scene.masks(question.targets),
        response=question.response,
        question_type=question.question_type,
        source=preset.name,
    )


def with_question_types(preset: Preset, weights: Mapping[str, float]) -> Preset:
    """Replace the question type weights of a preset; empty weights keep its own."""
    if not weights:
        return preset
    return msgspec.structs.replace(preset, question_type_weights=dict(weights))


def preset_with_target(preset: Preset) -> Preset:
    """Give all question types of a preset that have a target the same weight, the others none."""
    types = [name for name in preset.question_type_weights if name != "none"]
    return with_question_types(preset, dict.fromkeys(types, 1.0))
