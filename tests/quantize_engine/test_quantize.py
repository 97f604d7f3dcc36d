"""`coprs-deploy quantize` with llm-compressor: what it writes, how it is read, what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coprs_deploy import demo
from coprs_deploy.checkpoint import POLICY_DIRECTORY, read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.conversion.policy_files import copy_policy_files
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.examples import SceneExamples, held_out_examples
from coprs_deploy.errors import CheckpointError, EquivalenceError
from coprs_deploy.export import policy_quantization
from coprs_deploy.export.calibration_examples import split_examples
from coprs_deploy.export.policy_quantization import (
    SCHEMES,
    QuantizationOptions,
    quantize_checkpoint,
)
from coprs_deploy.export.tolerances import QUANTIZED_POLICY_TOLERANCES, PolicyTolerance
from coprs_deploy.policy import PolicyRequest
from coprs_deploy.policy.transformers_policy import TransformersPolicy

STORED = {"w4a16": "weight_packed", "w8a8": "weight", "fp8": "weight"}
DTYPES = {"w4a16": torch.int32, "w8a8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def float_checkpoint():
    return read_checkpoint(demo.CHECKPOINT)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, float_checkpoint, examples):
    """Return the demo checkpoint quantized by a scheme; made once."""
    made = {}

    def make(scheme):
        if scheme not in made:
            out = tmp_path_factory.mktemp(scheme) / "checkpoint"
            made[scheme] = quantize_checkpoint(float_checkpoint.path, out, scheme, examples)
        return made[scheme]

    return make


def open_policy(checkpoint):
    config = checkpoint.config
    limits = config.policy_image
    return TransformersPolicy(
        checkpoint.policy_path, config.prompt, limits.min_pixels, limits.max_pixels
    )


def respond(checkpoint, examples):
    with open_policy(checkpoint) as policy:
        return [list(policy.stream(PolicyRequest(e.image, e.instruction)))[-1] for e in examples]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_the_demo_model_passes_its_check(quantized, scheme):
    record = read_checkpoint(quantized(scheme).path).config.policy_quantization
    assert record.scheme == scheme
    assert record.group_size == (32 if scheme == "w4a16" else None)  # 352 columns
    assert record.tool.startswith("llmcompressor 0.14")
    assert (record.calibration.num_samples, record.calibration.num_held_out) == (24, 8)
    assert record.equivalence.passed
    assert record.equivalence.inputs == 8
    assert record.equivalence.token_agreement == 1
    assert record.equivalence.mask_iou > 0.98
    assert 1e-3 < record.equivalence.relative_error < 0.12  # it is quantized


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_changes_the_decoder_only(quantized, float_checkpoint, scheme):
    found = load_file(quantized(scheme).policy_path / "model.safetensors")
    wanted = load_file(float_checkpoint.policy_path / "model.safetensors")
    for name, tensor in wanted.items():
        module = name.removesuffix(".weight")
        if ".layers." in name and name.endswith("_proj.weight"):
            assert found[f"{module}.{STORED[scheme]}"].dtype == DTYPES[scheme], name
            assert f"{module}.weight_scale" in found
        else:
            torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_policy_keeps_its_configuration_and_files(quantized, float_checkpoint, scheme):
    source, policy = float_checkpoint.policy_path, quantized(scheme).policy_path
    assert {file.name for file in source.iterdir()} <= {file.name for file in policy.iterdir()}
    config = json.loads((policy / "config.json").read_text())
    method = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert method["quant_method"] == "compressed-tensors"
    assert method["quantization_status"] == "compressed"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_reads_the_quantized_policy(quantized, float_checkpoint, scheme):
    scenes = held_out_examples(PLAIN, 3, 1)
    found, expected = respond(quantized(scheme), scenes), respond(float_checkpoint, scenes)
    tolerance = QUANTIZED_POLICY_TOLERANCES[scheme]
    for response, wanted in zip(found, expected, strict=True):
        assert response.token_ids == wanted.token_ids
        difference = np.abs(response.concentrations - wanted.concentrations).max(initial=0)
        assert difference <= tolerance.relative_error * np.abs(wanted.concentrations).max(initial=1)
    assert not np.array_equal(found[0].concentrations, expected[0].concentrations)


def test_llava_and_images_of_several_sizes_without_responses(tiny_llava_checkpoint, tmp_path):
    def rows():
        for number, example in enumerate(SceneExamples(PLAIN, 8, 0)):
            image = np.ascontiguousarray(example.image[: 128 - 12 * number])
            masks = np.ones((1, *image.shape[:2]), bool)
            yield dataclasses.replace(example, image=image, masks=masks, response="")

    write_examples(tmp_path / "examples.jsonl", rows())
    steps = []
    checkpoint = quantize_checkpoint(
        tiny_llava_checkpoint,
        tmp_path / "out",
        "w4a16",
        tmp_path / "examples.jsonl",
        report=steps.append,
    )
    assert "responses of the float policy" in steps
    assert checkpoint.config.policy_quantization.equivalence.passed
    tensors = load_file(checkpoint.policy_path / "model.safetensors")
    packed = [name for name in tensors if name.endswith("weight_packed")]
    assert packed
    assert all(".layers." in name and "vision" not in name for name in packed)


def test_the_check_notices_a_damaged_scale(quantized, float_checkpoint, examples, tmp_path):
    checkpoint = quantized("w8a8")
    policy = tmp_path / POLICY_DIRECTORY
    policy.mkdir()
    copy_policy_files(checkpoint.policy_path, policy)
    tensors = load_file(checkpoint.policy_path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight_scale"] *= 3
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    split = split_examples(examples)
    found = policy_quantization._check(float_checkpoint, policy, "w8a8", split, lambda step: None)
    assert not found.passed
    message = str(policy_quantization._refusal(float_checkpoint, policy, "w8a8", split, found))
    errors = [float(line.split()[-1][:-1]) for line in message.splitlines() if "  layer" in line]
    assert len(errors) == 5
    assert max(errors[:2]) < 3
    assert errors[2] > 10


def test_a_policy_outside_its_tolerance_is_refused(
    float_checkpoint, examples, tmp_path, monkeypatch
):
    impossible = PolicyTolerance(0, 0, 1, 1, 1, "none")
    monkeypatch.setitem(QUANTIZED_POLICY_TOLERANCES, "fp8", impossible)
    out = tmp_path / "out"
    with pytest.raises(EquivalenceError, match=r"fp8: .*(?s:accepted: 100%.*layer 4: .*--scheme)"):
        quantize_checkpoint(float_checkpoint.path, out, "fp8", examples)
    assert list(tmp_path.iterdir()) == []
    options = QuantizationOptions(allow_inexact_policy=True)
    found = quantize_checkpoint(float_checkpoint.path, out, "fp8", examples, options)
    assert not found.config.policy_quantization.equivalence.passed


def test_a_quantized_policy_is_not_quantized_again(quantized, examples, tmp_path):
    with pytest.raises(CheckpointError, match=r"is quantized \(compressed-tensors\), and quantiz"):
        quantize_checkpoint(quantized("fp8").path, tmp_path / "out", "w8a8", examples)


def test_the_command_prints_one_json_object(float_checkpoint, examples, tmp_path, capfd):
    words = [str(float_checkpoint.path), "--out", str(tmp_path / "out"), "--scheme", "fp8"]
    assert main(["quantize", *words, "--calibration", str(examples), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["checkpoint"] == str(tmp_path / "out")
    assert shown["quantization"]["equivalence"]["passed"]
