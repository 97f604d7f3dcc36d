"""Image preprocessing of a policy: vision tokens, pixel values, required files."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
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
def test_vision_processor_qwen_has_one_token_per_28_pixel_square(tiny_checkpoint, width, height):
    inputs = open_processor(tiny_checkpoint / "policy")(Image.new("RGB", (width, height)))
    time, rows, columns = inputs.tensors["image_grid_thw"][0].tolist()
    assert time == 1
    assert inputs.num_tokens == rows * columns // 4
    assert abs(14 * rows - height) <= 14
    assert abs(14 * columns - width) <= 14
    assert inputs.tensors["pixel_values"].shape[0] == rows * columns
    assert inputs.marks_image_tokens


@pytest.mark.parametrize(("strategy", "num_tokens"), [("default", 16), ("full", 17)])
def test_vision_processor_llava_has_a_constant_number_of_tokens(
    tiny_llava_checkpoint, strategy, num_tokens
):
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
def test_num_tokens_from_the_size_equals_the_preprocessed_image(name, size, request):
    processor = open_processor(request.getfixturevalue(name) / "policy")
    num_tokens = processor.num_tokens(*size)
    assert num_tokens == processor(Image.new("RGB", size)).num_tokens
    assert num_tokens <= processor.max_tokens


@pytest.mark.parametrize("num_tokens", [3, 10, 16])
def test_largest_image_has_nearly_the_given_number_of_tokens(tiny_checkpoint, num_tokens):
    processor = open_processor(tiny_checkpoint / "policy")
    assert processor.max_tokens == 16
    width, height = processor.largest_image(num_tokens)
    assert 0.7 * num_tokens <= processor.num_tokens(width, height) <= num_tokens


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_llava_checkpoint"])
def test_vision_processor_pixel_values_depend_on_the_image(name, request):
    processor = open_processor(request.getfixturevalue(name) / "policy")
    red, blue = (
        processor(Image.new("RGB", (56, 56), color)).tensors["pixel_values"]
        for color in ("red", "blue")
    )
    assert not torch.allclose(red, blue, atol=0.5)


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_llava_checkpoint"])
@pytest.mark.parametrize("size", [(56, 56), (61, 100), (300, 40)])
def test_vision_processor_returns_the_inputs_of_transformers(name, size, request):
    processor = open_processor(request.getfixturevalue(name) / "policy")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = processor.image_processor(images=[image], return_tensors="pt")
    found = processor(image).tensors
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


def test_vision_processor_with_a_step_switched_off_is_refused(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint / "policy", tmp_path / "policy")
    file = tmp_path / "policy" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_normalize": False}))
    with pytest.raises(PolicyError, match=r"do_normalize is false .* accepted: true"):
        open_processor(tmp_path / "policy")


def test_vision_processor_unsupported_model_type_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"type 'gemma3'; supported: qwen2_5_vl, llava"):
        VisionProcessor(tmp_path, SimpleNamespace(model_type="gemma3"))


@pytest.mark.parametrize("content", [None, "{", json.dumps({"image_processor_type": "Nonsense"})])
def test_vision_processor_unusable_image_processor_is_refused(tiny_checkpoint, tmp_path, content):
    directory = tmp_path / "policy"
    shutil.copytree(tiny_checkpoint / "policy", directory)
    file = directory / "preprocessor_config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(PolicyError, match=r"the image processor in .* cannot be loaded"):
        open_processor(directory)
