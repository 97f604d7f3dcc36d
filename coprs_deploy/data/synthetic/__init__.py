"""Synthetic scenes: pictures of shapes whose every pixel, word and answer is known.

From a seed come a picture with a table of its objects (``make_scene``), questions about it with
their targets and reasoning (``ask``), and examples to train on (``SceneExamples``). The modules,
from the bottom up:

    vocabulary, draws, tiers      words and colors; portable random draws; the two worlds
    shapes, layout, painting      outlines; which object lies where; pixels
    scene, generator              the result; from seed to scene
    expressions, wording          what a question points at; its words
    reasoning, questions          the thought; clear questions with their answers
    reader                        an independent second reading, which checks all of it
    dataset, contact_sheet        examples by seed; a page to look at
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
from coprs_deploy.data.synthetic.questions import Question, ask
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
    "ask",
    "example_from_question",
    "make_scene",
]
