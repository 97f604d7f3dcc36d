"""A recipe that trains in seconds, and the folder of its rendered scenes."""

from pathlib import Path

import pytest

TINY_RECIPE = """
description = "a test"
seed = 3
precision = "fp32"
save_dtype = "float16"
num_processes = {num_processes}
num_threads = 1
logging_steps = 1
save_steps = 2

[data]
kind = "synthetic"
preset = "plain"
num_training_scenes = 12
num_held_out_scenes = 3
num_no_match_scenes = 1

[model]
kind = "tiny"

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

[stages.perception]
kind = "perception"
max_steps = 2
global_batch_size = 4
num_eval_examples = 4
optimizer = {{ name = "{optimizer}" }}

[stages.segmentation]
kind = "segmentation"
max_steps = {max_steps}
global_batch_size = 4
num_eval_examples = 4
loss_weights = {{ prior_bce = 4.0, mask_dice = 1.0, mask_bce = 4.0 }}
optimizer = {{ name = "{optimizer}" }}

[stages.joint]
kind = "reasoning"
max_steps = {max_steps}
global_batch_size = 4
questions_per_image = 2
max_packed_length = 192
location_token_weight = 2.0
reference_head_loss_weight = 0.1
auxiliary_loss_weight = 0.3
segmentation_loss_weight = 1.0
segmentation_ratio = 0.7
init_query_head = true
train_image_encoder = true
num_eval_examples = 2
optimizer = {{ name = "{optimizer}" }}
"""


@pytest.fixture(scope="session")
def write_recipe(tmp_path_factory):
    """Return a function that writes the tiny recipe and returns its path."""

    def write(num_processes: int = 1, max_steps: int = 3, optimizer: str = "muon") -> Path:
        path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
        path.write_text(
            TINY_RECIPE.format(
                num_processes=num_processes, max_steps=max_steps, optimizer=optimizer
            )
        )
        return path

    return write


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
    """Return the folder of rendered scenes that all runs share."""
    return tmp_path_factory.mktemp("scenes")
