"""Scenes in public layouts on the demo model: masks and pixel counts are those of the scenes."""

from __future__ import annotations

import numpy as np
import pytest

from coprs_deploy import CoPRS
from coprs_deploy.data.public_layouts import LAYOUTS
from coprs_deploy.data.readers.registry import SourceOptions
from coprs_deploy.data.sources import open_examples
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN, SceneExamples
from tests.integration.test_command_line import run_json

FIRST_SEED, NUM_SCENES = 516, 4


def counts(coprs, examples, max_targets):
    """Return, of each example, the pixels of prediction, intersection and union."""
    found = []
    for example in examples:
        result = coprs.segment(example.image, example.instruction, max_targets)
        predicted, target = result.masks.any(axis=0), example.masks.any(axis=0)
        pairs = [predicted, predicted & target, predicted | target]
        found.append((len(result.masks), *map(np.count_nonzero, pairs)))
    return found


@pytest.mark.slow
def test_scenes_in_each_layout_are_evaluated_like_the_scenes(tmp_path):
    arguments = ("--held-out", "--first-seed", str(FIRST_SEED), "--num-examples", str(NUM_SCENES))
    scenes = SceneExamples(PLAIN, NUM_SCENES, HELD_OUT_SEED + FIRST_SEED)
    with CoPRS.load(policy="openvino") as coprs:
        direct = counts(coprs, scenes, PLAIN.max_targets)
        assert [number for number, *_ in direct] == [len(scene.masks) for scene in scenes]
        assert 0 in [number for number, *_ in direct]
        for layout in LAYOUTS:
            root = tmp_path / layout
            source = run_json("synth", *arguments, "--layout", layout, "--out", root)["source"]
            opened = open_examples(source, options=SourceOptions(root))
            assert counts(coprs, opened.examples, opened.max_targets) == direct, layout
