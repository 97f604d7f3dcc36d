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

from coprs_deploy.training.scenes.dataset import SceneExamples, example_from_question
from coprs_deploy.training.scenes.generator import make_scene
from coprs_deploy.training.scenes.questions import Question, ask
from coprs_deploy.training.scenes.scene import Scene, SceneObject
from coprs_deploy.training.scenes.tiers import (
    FULL,
    HELD_OUT_SEED,
    KINDS,
    PLAIN,
    TIERS,
    Tier,
)

__all__ = [
    "FULL",
    "HELD_OUT_SEED",
    "KINDS",
    "PLAIN",
    "TIERS",
    "Question",
    "Scene",
    "SceneExamples",
    "SceneObject",
    "Tier",
    "ask",
    "example_from_question",
    "make_scene",
]
