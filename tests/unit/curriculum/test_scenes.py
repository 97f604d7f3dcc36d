"""Generated scenes on disk and as training batches."""

import numpy as np
import pytest

from coprs_deploy.curriculum.scenes import (
    SceneSource,
    attribute_values,
    store_scenes,
    target_masks,
)
from coprs_deploy.data.synthetic import HELD_OUT_SEED, PLAIN
from coprs_deploy.data.synthetic.scene import make_scene


@pytest.fixture(scope="module")
def scenes(scenes_dir):
    return store_scenes(PLAIN, HELD_OUT_SEED, 6, scenes_dir)


def test_store_scenes_keeps_the_scenes_of_their_seeds(scenes):
    stored, rendered = scenes.scene(2), make_scene(PLAIN, HELD_OUT_SEED + 2)
    assert np.array_equal(stored.image, rendered.image)
    assert stored.objects == rendered.objects


def test_scene_source_shares_a_batch_between_processes(scenes):
    source = SceneSource(PLAIN, scenes, seed=1)
    whole = source.indices(3, 4, 0, 1)
    halves = [source.indices(3, 4, rank, 2) for rank in range(2)]
    assert sorted(whole) == sorted(halves[0] + halves[1])


def test_scene_source_shuffles_each_epoch(scenes):
    source = SceneSource(PLAIN, scenes, seed=1)
    epochs = [
        [i for step in range(3) for i in source.indices(3 * e + step, 2, 0, 1)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]


def test_scene_source_questions_depend_on_seed_and_step_alone(scenes):
    source, other = SceneSource(PLAIN, scenes, seed=1), SceneSource(PLAIN, scenes, seed=1)
    assert source.questions(0, 5, 3, {}) == other.questions(0, 5, 3, {})
    assert source.questions(0, 5, 3, {}) != source.questions(0, 6, 3, {})


def test_scene_batch_numbers_attributes_within_their_sizes(scenes):
    batch = SceneSource(PLAIN, scenes, seed=0).batch(range(6))
    for column, values in enumerate(attribute_values(PLAIN).values()):
        assert batch.attributes[..., column].min() >= 0
        assert batch.attributes[..., column].max() < len(values)


def test_target_masks_are_those_of_the_scene(scenes):
    batch = SceneSource(PLAIN, scenes, seed=0).batch([4])
    numbers = range(len(scenes.objects[4]))
    masks = target_masks(
        batch, batch.num_objects.new_zeros(len(numbers)), batch.num_objects.new_tensor(numbers)
    )
    assert np.array_equal(masks.numpy(), scenes.scene(4).masks(numbers))
