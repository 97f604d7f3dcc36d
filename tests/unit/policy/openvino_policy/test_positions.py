"""Positions and windows of Qwen2.5-VL in numpy against transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from coprs_deploy.policy.openvino_policy.positions import (
    MASKED,
    QwenVision,
    common_prefix,
    prompt_positions,
    vision_inputs,
)

SIZES = QwenVision(patch_size=14, spatial_merge_size=2, window_size=112)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    path = tiny_checkpoint / "policy"
    config = AutoConfig.from_pretrained(path)
    assert config.vision_config.window_size == SIZES.window_size
    return AutoModelForImageTextToText.from_pretrained(path).model


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (10, 6), (18, 24)])
def test_prompt_positions_equal_those_of_transformers(model, grid):
    image_id = model.config.image_token_id
    num_tokens = grid[0] * grid[1] // 4
    ids = torch.tensor([[5, 9, 7, *[image_id] * num_tokens, 3, 2]])
    expected, _ = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == image_id).int(),
        image_grid_thw=torch.tensor([[1, *grid]]),
    )
    found = prompt_positions(ids[0].numpy() == image_id, grid, 2)
    np.testing.assert_array_equal(found, expected[:, 0].numpy())


@pytest.mark.parametrize("grid", [(4, 4), (10, 6), (18, 24)])
def test_vision_inputs_cover_each_patch_once_within_its_window(grid):
    count = grid[0] * grid[1]
    patches = np.arange(count, dtype=np.float32)[:, None]
    inputs = vision_inputs(patches, grid, SIZES)
    assert sorted(inputs["patches"][:, 0]) == list(range(count))
    windows, _, _, size = inputs["slot_mask"].shape
    used = inputs["slot_mask"].reshape(windows, size) == 0
    assert used.sum() == count
    assert set(inputs["slot_mask"][inputs["slot_mask"] != 0]) <= {np.float32(MASKED)}
    # Gathering into the slots and back is the identity.
    np.testing.assert_array_equal(inputs["slots"][inputs["unslot"]], np.arange(count))
    # The patches of a window lie in one square of 8 x 8 patches.
    squares = inputs["positions"] // 8
    for window in range(windows):
        members = inputs["slots"].reshape(windows, size)[window][used[window]]
        assert len(np.unique(squares[members], axis=0)) == 1
    # The tokens come back in the order of the image.
    tokens = inputs["patches"].reshape(-1, 4)[inputs["image_order"]]
    np.testing.assert_array_equal(tokens.ravel(), np.arange(count))


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)],
)
def test_common_prefix_counts_equal_leading_tokens(first, second, length):
    assert common_prefix(first, second) == length
