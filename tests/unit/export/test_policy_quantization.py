"""Quantized policies without llm-compressor: examples, refusals, records, the way into a bundle."""

import dataclasses
import importlib.util
import json
import shutil
import sys

import msgspec
import numpy as np
import pytest
import torch

from coprs_deploy import demo
from coprs_deploy.artifacts import write_json
from coprs_deploy.bundle import (
    PolicyCalibration,
    PolicyEquivalence,
    PolicyQuantization,
    read_manifest,
)
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN
from coprs_deploy.data.synthetic.examples import SceneExamples
from coprs_deploy.errors import CheckpointError, MissingDependencyError
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.export.calibration_examples import split_examples
from coprs_deploy.export.policy_quantization import (
    choose_group_size,
    describe_layer_errors,
    quantize_checkpoint,
)
from coprs_deploy.policy.compressed_weights import check_readable, quantization_method

RECORD = PolicyQuantization(
    scheme="w8a8",
    group_size=None,
    tool="llmcompressor 0.14.0.1",
    calibration=PolicyCalibration("scenes.jsonl", 96, 16, "ab"),
    equivalence=PolicyEquivalence(0.013, 1e-3, 0.9999, 1.0, 1.0, 16, 543, True),
)


@pytest.fixture(scope="module")
def scenes():
    """Twelve scenes; the first two also with another instruction."""
    made = list(SceneExamples(PLAIN, 12, 0))
    return [*made, *(dataclasses.replace(e, id=f"{e.id}b", instruction="it") for e in made[:2])]


def split(path, examples):
    write_examples(path, examples)
    return split_examples(path)


def test_split_examples_holds_out_images(scenes, tmp_path):
    found = split(tmp_path / "a.jsonl", [*scenes, dataclasses.replace(scenes[3], id="again")])
    used, held_out = ([found.file.load(i) for i in rows] for rows in (found.used, found.held_out))
    assert len(used) + len(held_out) == len(scenes)  # the duplicate is left out
    images = {e.image.tobytes() for e in held_out}
    assert len(images) == 3
    assert images.isdisjoint(e.image.tobytes() for e in used)
    record = found.record()
    assert record.source == "a.jsonl"
    assert (record.num_samples, record.num_held_out) == (len(used), len(held_out))


def test_split_examples_does_not_depend_on_the_order_of_rows(scenes, tmp_path):
    first, second = split(tmp_path / "a.jsonl", scenes), split(tmp_path / "b.jsonl", scenes[::-1])
    assert first.sha256 == second.sha256
    other = [dataclasses.replace(e, instruction=f"{e.instruction} please") for e in scenes]
    assert split(tmp_path / "c.jsonl", other).sha256 != first.sha256


def test_split_examples_refuses_too_few(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"has 7 different examples about 7 images; accepted: at"):
        split(tmp_path / "a.jsonl", [*scenes[:7], dataclasses.replace(scenes[0], id="again")])
    same = [dataclasses.replace(scenes[0], id=str(i), instruction=str(i)) for i in range(9)]
    with pytest.raises(ValueError, match=r"9 different examples about 1 images"):
        split(tmp_path / "b.jsonl", same)


def test_quantize_checkpoint_without_llm_compressor_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(
        MissingDependencyError, match=r'llmcompressor.*pip install -e "\.\[quantize'
    ):
        quantize_checkpoint(demo.CHECKPOINT, tmp_path / "out", "fp8", tmp_path / "examples.jsonl")


def test_quantize_checkpoint_refuses_an_unknown_scheme(tmp_path):
    with pytest.raises(ValueError, match=r"scheme is 'w2'; accepted: w4a16, w8a8, fp8"):
        quantize_checkpoint(demo.CHECKPOINT, tmp_path / "out", "w2", tmp_path / "examples.jsonl")


def model_with_columns(*columns):
    layers = torch.nn.ModuleList(torch.nn.Linear(number, 8) for number in columns)
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.language_model = layers
    return model


def test_choose_group_size_divides_the_columns_of_every_layer():
    assert choose_group_size(model_with_columns(3584, 18944)) == 128  # Qwen2.5-VL 7B
    assert choose_group_size(model_with_columns(128, 352)) == 32
    with pytest.raises(ValueError, match=r"\[48, 128\] columns; accepted: multiples of 32; use w8"):
        choose_group_size(model_with_columns(128, 48))


def test_describe_layer_errors_lists_each_layer():
    wanted = [np.ones((1, 4, 2)), np.full((1, 4, 2), 2.0)]
    lines = describe_layer_errors([wanted[0] * 1.01, wanted[1] * 0.5], wanted).splitlines()
    assert lines[1:] == ["  layer 0: 1.00%", "  layer 1: 50.00%"]


@pytest.fixture
def quantized(tiny_checkpoint, tmp_path):
    """``tiny_checkpoint`` with the marks of a quantized policy."""
    path = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, path)
    config = read_checkpoint(path).config
    changed = msgspec.structs.replace(config, policy_quantization=RECORD)
    write_json(path / "config.json", changed.to_json())
    file = path / "policy" / "config.json"
    method = {"quantization_config": {"quant_method": "compressed-tensors"}}
    write_json(file, {**json.loads(file.read_text()), **method})
    return read_checkpoint(path)


def test_a_checkpoint_keeps_the_record(quantized, tiny_checkpoint):
    assert quantized.config.policy_quantization == RECORD
    assert quantization_method(quantized.policy_path) == "compressed-tensors"
    assert read_checkpoint(tiny_checkpoint).config.policy_quantization is None
    assert quantization_method(read_checkpoint(tiny_checkpoint).policy_path) is None


@pytest.mark.extended
def test_export_copies_policy_and_record_into_the_bundle(quantized, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    export_checkpoint(quantized, bundle)
    assert read_manifest(bundle).policy.quantization == RECORD
    assert quantization_method(bundle / "policy") == "compressed-tensors"
    assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "quantized: w8a8 by llmcompressor 0.14.0.1; 100.0% of 543 tokens equal" in shown


def test_graphs_of_a_quantized_policy_are_refused(quantized, tmp_path):
    with pytest.raises(CheckpointError, match=r"policy-runtime openvino needs float weights; use"):
        export_checkpoint(quantized, tmp_path / "b", ExportOptions(policy_runtime="openvino"))


def test_check_readable_names_the_pip_line(quantized, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_readable(read_checkpoint(tiny_checkpoint).policy_path)
    with pytest.raises(MissingDependencyError, match=r"needs compressed-tensors: pip install comp"):
        check_readable(quantized.policy_path)
