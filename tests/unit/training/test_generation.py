"""Greedy responses for the gallery of a report."""

import pytest

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.data.synthetic.examples import held_out_examples
from coprs_deploy.data.synthetic.presets import PRESETS
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.policy.vision_inputs import VisionProcessor
from coprs_deploy.training.examples import ExampleSets
from coprs_deploy.training.generation import respond, until_end
from coprs_deploy.training.runs.gallery import spread_indices
from coprs_deploy.training.state import state_from_checkpoint


@pytest.mark.slow
def test_respond_segments_the_target_and_leaves_the_policy_as_it_was():
    checkpoint = read_checkpoint(CHECKPOINT)
    state = state_from_checkpoint(checkpoint)
    names = set(state.policy.model.state_dict())
    examples = held_out_examples(PRESETS["plain"], 2, 1)
    vision = VisionProcessor(checkpoint.policy_path, state.policy.model.config)
    samples = respond(state, ExampleSets(examples, examples, vision, 0), examples)
    assert set(state.policy.model.state_dict()) == names
    for example, sample in zip(examples[:2], samples, strict=False):
        assert sample.mask_iou > 0.8
        assert sample.prior.shape == example.image.shape[:2]
        assert sample.response.endswith("<REF_POS>")
        assert sample.reward > 0.8
    none = samples[2]
    assert none.mask_iou is None
    assert none.prior is None, "a prior was invented"
    assert not len(none.masks)
    assert none.reward == 1.0


def test_spread_indices_covers_the_data():
    assert spread_indices(10, 4) == [0, 3, 6, 9]
    assert spread_indices(2, 8) == [0, 1]
    assert spread_indices(5, 0) == spread_indices(0, 5) == []


def test_until_end_cuts_after_the_first_end():
    assert until_end([5, 9, 7, 9], {9}) == [5, 9]
    assert until_end([5, 6], {9}) == [5, 6]
