"""Synthetic scenes: images of shapes with exact masks, questions and reasoning. numpy only.

A seed gives an image with a table of its objects (:func:`make_scene`), questions about it with
targets and reasoning (:func:`ask_questions`), and examples (:class:`SceneExamples`). The modules,
bottom up:

    vocabulary, rng, presets      terms and colors; portable random numbers; difficulty presets
    shapes, layout, rendering     outlines; positions and visible parts of objects; pixels
    scene                         the image with its instance map and its table of objects
    expressions, wording          referring expressions and their English
    reasoning, questions          reasoning; unambiguous questions with their targets
    verifier                      an independent reading that checks questions and reasoning
    examples                      examples by seed
"""

from coprs_deploy.data.synthetic.examples import SceneExamples, example_from_question
from coprs_deploy.data.synthetic.presets import (
    FULL,
    HELD_OUT_SEED,
    PLAIN,
    PRESETS,
    QUESTION_TYPES,
    Preset,
)
from coprs_deploy.data.synthetic.questions import Question, ask_questions
from coprs_deploy.data.synthetic.scene import Scene, SceneObject, make_scene

__all__ = [
    "FULL",
    "HELD_OUT_SEED",
    "PLAIN",
    "PRESETS",
    "QUESTION_TYPES",
    "Preset",
    "Question",
    "Scene",
    "SceneExamples",
    "SceneObject",
    "ask_questions",
    "example_from_question",
    "make_scene",
]
