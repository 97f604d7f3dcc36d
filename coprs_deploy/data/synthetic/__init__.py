"""Synthetic scenes: images of shapes with exact masks, questions and reasoning. numpy only.

A seed gives an image with a table of its objects (:func:`scene.make_scene`), questions about it
with targets and reasoning (:func:`questions.ask_questions`), and examples (:class:`SceneExamples`).
The modules, bottom up:

    vocabulary, rng, presets      terms and colors; portable random numbers; difficulty presets
    shapes, layout, rendering     outlines; positions and visible parts of objects; pixels
    scene                         the image with its instance map and its table of objects
    expressions, wording          referring expressions and their English
    reasoning, questions          reasoning; unambiguous questions with their targets
    examples                      examples by seed
"""

from coprs_deploy.data.synthetic.examples import SceneExamples
from coprs_deploy.data.synthetic.presets import FULL, HELD_OUT_SEED, PLAIN, PRESETS
from coprs_deploy.data.synthetic.scene import make_scene

__all__ = ["FULL", "HELD_OUT_SEED", "PLAIN", "PRESETS", "SceneExamples", "make_scene"]
