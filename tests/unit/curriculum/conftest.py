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
logging_steps = 1
save_steps = 2

[data]
kind = "scenes"
tier = "plain"
num_training_scenes = 12
num_held_out_scenes = 3
num_no_match_scenes = 1

[model]
kind = "small"

[model.policy]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 2
intermediate_size = 96
vision_hidden_size = 64
vision_depth = 1
vision_num_heads = 2
vision_intermediate_size = 96
max_response_tokens = 6

[model.segmentation]
policy_hidden_size = 64

[model.segmentation.sam]
encoder_embed_dim = 64
encoder_depth = 1
encoder_num_heads = 2
encoder_global_attn_indexes = [0]
window_size = 8
mlp_ratio = 2.0
use_rel_pos = false
mask_in_chans = 8
decoder_num_heads = 2
decoder_mlp_dim = 64
iou_head_hidden_dim = 32

[model.segmentation.sam.geometry]
image_size = 128
patch_size = 8
out_chans = 32

[phases.warm_up]
kind = "warm_up"
steps = 2
global_batch_size = 4
num_eval_examples = 4
optimizer = {{ muon = {muon} }}

[phases.segmentation]
kind = "segmentation"
steps = {steps}
global_batch_size = 4
num_eval_examples = 4
weights = {{ prior_bce = 4.0, mask_dice = 1.0, mask_bce = 4.0 }}
optimizer = {{ muon = {muon} }}

[phases.together]
kind = "supervised"
steps = {steps}
global_batch_size = 4
questions_per_image = 2
max_packed_length = 192
location_token_weight = 2.0
reference_head_loss_weight = 0.1
auxiliary_loss_weight = 0.3
segmentation_loss_weight = 1.0
segmentation_ratio = 0.7
join = true
train_image_encoder = true
num_eval_examples = 2
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
