"""The average of checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from coprs_deploy import demo
from coprs_deploy.checkpoint import SEGMENTATION_FILE, read_checkpoint
from coprs_deploy.errors import CheckpointError
from tests import ROOT
from tests.scripts import load_script

script = load_script("training/average_checkpoints.py")

FULL = ROOT / "examples/full/checkpoint"


def test_average_is_the_weighted_mean_in_the_stored_dtype(tmp_path, tiny_checkpoint):
    first, second = tiny_checkpoint, tmp_path / "second"
    script.shutil.copytree(first, second)
    file = second / SEGMENTATION_FILE
    changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
    script.save_file(changed, file)

    out = tmp_path / "out"
    assert script.main([f"{first}=0.25", f"{second}=0.75", "--out", str(out)]) == 0
    before, after = load_file(first / SEGMENTATION_FILE), load_file(out / SEGMENTATION_FILE)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, before[name] + 0.75)
    policy = "policy/model.safetensors"
    unchanged, averaged = load_file(first / policy), load_file(out / policy)
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, unchanged[name])
    provenance = read_checkpoint(out).config.provenance
    origins = provenance.pop("average")
    assert provenance == read_checkpoint(first).config.provenance
    fingerprints = [read_checkpoint(path).fingerprint() for path in (first, second)]
    assert [each["share"] for each in origins] == [0.25, 0.75]
    assert [each["fingerprint"] for each in origins] == fingerprints


@pytest.mark.parametrize("shares", [(0.5, 0.6), (1.5, -0.5), (1.0,)])
def test_shares_must_be_parts_of_a_whole(tmp_path, shares):
    parts = [(FULL, share) for share in shares]
    with pytest.raises(ValueError, match=r"the shares are .* that add up to 1"):
        script.average_checkpoints(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has other sizes or another prompt than"):
        script.average_checkpoints([(FULL, 0.5), (demo.CHECKPOINT, 0.5)], tmp_path / "out")


def test_another_tokenizer_is_refused(tmp_path, tiny_checkpoint):
    other = tmp_path / "other"
    script.shutil.copytree(tiny_checkpoint, other)
    tokenizer = other / script.TOKENIZER_FILE
    data = json.loads(tokenizer.read_text())
    data["added_tokens"][-1]["content"] += "x"
    tokenizer.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="has another tokenizer than"):
        script.average_checkpoints([(tiny_checkpoint, 0.5), (other, 0.5)], tmp_path / "out")


def test_other_tensors_are_refused_and_nothing_is_written(tmp_path, tiny_checkpoint):
    other = tmp_path / "other"
    script.shutil.copytree(tiny_checkpoint, other)
    tensors = load_file(other / SEGMENTATION_FILE)
    del tensors[min(tensors)]
    script.save_file(tensors, other / SEGMENTATION_FILE)
    with pytest.raises(CheckpointError, match="missing: "):
        script.average_checkpoints([(tiny_checkpoint, 0.5), (other, 0.5)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_part_without_a_share_is_named(capsys):
    with pytest.raises(SystemExit):
        script.main(["a", "--out", "b"])
    assert "'a'; accepted: CHECKPOINT=SHARE" in capsys.readouterr().err
