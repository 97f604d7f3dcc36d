"""A recipe that trains in seconds, and what its phases share."""

import sys
from pathlib import Path

import pytest

SMALL_RECIPE = """
description = "a test"
seed = 3
precision = "fp32"
store = "float16"
processes = {processes}
threads = 1
log_every = 1
save_every = 2

[data]
kind = "scenes"
tier = "plain"
training_scenes = 12
held_out_scenes = 3
no_match_scenes = 1

[model]
kind = "small"

[model.policy]
width = 64
depth = 2
heads = 2
mlp_width = 96
vision_width = 64
vision_depth = 1
vision_heads = 2
vision_mlp_width = 96
max_response_tokens = 6

[model.segmentation]
policy_width = 64

[model.segmentation.sam]
encoder_width = 64
encoder_depth = 1
encoder_heads = 2
global_attention_blocks = [0]
window_size = 8
mlp_ratio = 2.0
relative_positions = false
mask_prompt_channels = 8
decoder_heads = 2
decoder_mlp_width = 64
iou_head_width = 32

[model.segmentation.sam.geometry]
image_size = 128
patch_size = 8
embedding_channels = 32

[phases.warm_up]
kind = "warm_up"
steps = 2
batch_images = 4
evaluation_scenes = 4
optimizer = {{ muon = {muon} }}

[phases.segmentation]
kind = "segmentation"
steps = {steps}
batch_images = 4
evaluation_scenes = 4
weights = {{ prior_bce = 4.0, mask_dice = 1.0, mask_bce = 4.0 }}
optimizer = {{ muon = {muon} }}

[phases.together]
kind = "supervised"
steps = {steps}
batch_images = 4
questions_per_image = 2
packed_length = 192
place_weight = 2.0
readout_weight = 0.1
dense_weight = 0.3
segmentation_weight = 1.0
segmented_share = 0.7
join = true
train_image_encoder = true
evaluation_scenes = 2
optimizer = {{ muon = {muon} }}
"""


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Forget the precision of an earlier test: accelerate keeps it for the whole process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def write_recipe(tmp_path_factory):
    """Write the small recipe with other numbers; gives its path."""

    def write(processes: int = 1, steps: int = 3, muon: bool = True) -> Path:
        path = tmp_path_factory.mktemp("recipe") / "small.toml"
        path.write_text(
            SMALL_RECIPE.format(processes=processes, steps=steps, muon=str(muon).lower())
        )
        return path

    return write


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """Folder in which the runs of all tests keep the same pictures."""
    return tmp_path_factory.mktemp("scenes")
