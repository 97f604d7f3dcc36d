"""Examples of synthetic scenes."""

import numpy as np
import pytest

from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN, SceneExamples, make_scene


def test_scene_examples_is_a_sequence_by_seed():
    examples = SceneExamples(PLAIN, 5, first_seed=10)
    assert len(examples) == 5
    assert [example.id for example in examples] == [f"plain-{seed}" for seed in range(10, 15)]
    assert examples[-1].id == "plain-14"
    assert [example.id for example in examples[1:3]] == ["plain-11", "plain-12"]
    np.testing.assert_array_equal(examples[2].image, make_scene(PLAIN, 12).image)
    with pytest.raises(IndexError):
        examples[5]


def test_scene_examples_across_held_out_seeds_are_refused():
    assert len(SceneExamples(PLAIN, 10, HELD_OUT_SEED)) == 10
    assert len(SceneExamples(PLAIN, 10, HELD_OUT_SEED - 10)) == 10
    with pytest.raises(ValueError, match="held-out scenes begin"):
        SceneExamples(PLAIN, 10, HELD_OUT_SEED - 5)
    with pytest.raises(ValueError, match="num_examples is 0"):
        SceneExamples(PLAIN, 0)
