"""The image side of a policy: how many vision tokens a picture takes, and which files it needs."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from coprs_deploy.errors import PolicyError
from coprs_deploy.policy.vision_inputs import VisionProcessor


def open_processor(directory, **changes):
    config = AutoConfig.from_pretrained(directory)
    for name, value in changes.items():
        setattr(config, name, value)
    return VisionProcessor(directory, config)


@pytest.mark.parametrize(("width", "height"), [(56, 56), (112, 56), (56, 168), (100, 61)])
def test_qwen_takes_a_token_for_every_square_of_28_pixels(tiny_checkpoint, width, height):
    inputs = open_processor(tiny_checkpoint / "policy")(Image.new("RGB", (width, height)))
    time, rows, columns = inputs.tensors["image_grid_thw"][0].tolist()
    assert time == 1
    assert inputs.num_tokens == rows * columns // 4
    assert abs(14 * rows - height) <= 14
    assert abs(14 * columns - width) <= 14
    assert inputs.tensors["pixel_values"].shape[0] == rows * columns
    assert inputs.marks_image_tokens


@pytest.mark.parametrize(("strategy", "num_tokens"), [("default", 16), ("full", 17)])
def test_llava_takes_the_same_tokens_for_every_picture(tiny_llava_checkpoint, strategy, num_tokens):
    processor = open_processor(
        tiny_llava_checkpoint / "policy", vision_feature_select_strategy=strategy
    )
    for size in ((56, 56), (112, 56), (30, 200)):
        inputs = processor(Image.new("RGB", size))
        assert inputs.num_tokens == num_tokens
        assert inputs.tensors["pixel_values"].shape == (1, 3, 56, 56)
        assert not inputs.marks_image_tokens


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_llava_checkpoint"])
@pytest.mark.parametrize("size", [(56, 56), (112, 84), (61, 100), (300, 40), (9, 200)])
def test_tokens_are_told_without_preparing_the_picture(name, size, request):
    processor = open_processor(request.getfixturevalue(name) / "policy")
    told = processor.num_tokens(*size)
    assert told == processor(Image.new("RGB", size)).num_tokens
    assert told <= processor.most_tokens


@pytest.mark.parametrize("most", [3, 10, 16])
def test_the_largest_picture_takes_nearly_the_tokens_that_it_may(tiny_checkpoint, most):
    processor = open_processor(tiny_checkpoint / "policy")
    assert processor.most_tokens == 16
    width, height = processor.largest_picture(most)
    assert 0.7 * most <= processor.num_tokens(width, height) <= most


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_llava_checkpoint"])
def test_pixels_depend_on_the_picture(name, request):
    processor = open_processor(request.getfixturevalue(name) / "policy")
    red, blue = (
        processor(Image.new("RGB", (56, 56), color)).tensors["pixel_values"]
        for color in ("red", "blue")
    )
    assert not torch.allclose(red, blue, atol=0.5)


def test_a_policy_of_another_type_is_refused_with_the_supported_ones(tmp_path):
    with pytest.raises(PolicyError, match=r"type 'gemma3'; supported: qwen2_5_vl, llava"):
        VisionProcessor(tmp_path, SimpleNamespace(model_type="gemma3"))


@pytest.mark.parametrize("content", [None, "{", json.dumps({"image_processor_type": "Nonsense"})])
def test_a_directory_without_an_image_processor_is_refused(tiny_checkpoint, tmp_path, content):
    directory = tmp_path / "policy"
    shutil.copytree(tiny_checkpoint / "policy", directory)
    file = directory / "preprocessor_config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(PolicyError, match="holds no usable image processor"):
        open_processor(directory)
