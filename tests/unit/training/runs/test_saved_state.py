"""Saved states of a run as checkpoints."""

import json

import pytest
import torch
from peft import get_peft_model

from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.training.features import encoder_fingerprint
from coprs_deploy.training.grpo.arguments import lora_config
from coprs_deploy.training.grpo.attachment import ATTRIBUTE, SegmentationHead
from coprs_deploy.training.grpo.distribution import save_trainable_weights
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.runs.saved_state import choose_state, select_trained
from coprs_deploy.training.settings import SupervisedSettings
from coprs_deploy.training.state import state_from_checkpoint
from coprs_deploy.training.supervised_stage import ExampleObjective

SUPERVISED = SupervisedSettings(max_steps=9, segmentation_loss_weight=1.0)


def write_run(path, recipe):
    """Write a run with an empty state after three steps; return its stage and the state."""
    ((name, _),) = recipe.stages.items()
    folder = RunDirectory(path).stage(name) / "state-000003"
    folder.mkdir(parents=True)
    (path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    (folder / "progress.json").write_text(json.dumps({"step": 3}))
    return folder


def change(weights):
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.01 * torch.ones_like(weight))


def grpo_recipe(*more):
    return load_recipe("grpo_demo", ["save_dtype=bfloat16", *more])


def export(run, capsys, *more):
    assert main(["train", "--export-state", str(run), *more]) == 0
    return read_checkpoint(capsys.readouterr().out.strip())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("rank", [0, 4])
def test_export_of_a_grpo_state_merges_it_and_keeps_the_encoder(tmp_path, capsys, rank):
    recipe = grpo_recipe(f"stages.grpo.lora.r={rank}")
    folder = write_run(tmp_path, recipe)
    state, settings = state_from_checkpoint(read_checkpoint(CHECKPOINT)), recipe.stages["grpo"]
    before = {name: tensor.clone() for name, tensor in state.policy.model.state_dict().items()}
    select_trained(recipe, settings, state)
    policy, head = state.policy.model, SegmentationHead(state.segmentation)
    head.requires_grad_(True)  # as a stage in the mode "joint" does
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    policy.add_module(ATTRIBUTE, head)
    model = get_peft_model(policy, lora_config(settings.lora)) if rank else policy
    for weight in trained:
        weight.requires_grad_(True)
    change(weight for weight in model.parameters() if weight.requires_grad)
    save_trainable_weights(folder, model)

    exported = export(tmp_path, capsys)
    assert exported.path == tmp_path / "exported" / "grpo-000003"
    assert exported.config.provenance["step"] == 3
    segmentation = load_segmentation_model(exported)
    start = load_segmentation_model(read_checkpoint(CHECKPOINT))
    assert encoder_fingerprint(segmentation) == encoder_fingerprint(start)
    found = segmentation.state_dict()["prior.q_proj.weight"]
    expected = state.segmentation.state_dict()["prior.q_proj.weight"].bfloat16().float()
    assert torch.equal(found, expected)
    after = state_from_checkpoint(exported).policy.model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.allclose(after[name], before[name], atol=2e-3)}
    assert changed
    assert not rank or all("_proj.weight" in name and "visual" not in name for name in changed)


def test_export_of_a_supervised_state_has_its_weights(tmp_path, capsys):
    base = grpo_recipe("save_dtype=float32").to_json()
    base["stages"] = {"first": SUPERVISED.to_json()}
    recipe = type(grpo_recipe()).from_json(base)
    folder = write_run(tmp_path, recipe)
    state = state_from_checkpoint(read_checkpoint(CHECKPOINT))
    objective = ExampleObjective(state, SUPERVISED)
    change(state.policy.model.parameters())
    torch.save(objective.state_dict(), folder / "pytorch_model.bin")
    exported = export(tmp_path, capsys, "--step", "3", "--out", str(tmp_path / "out"))
    assert exported.path == tmp_path / "out"
    found = state_from_checkpoint(exported).policy.model.state_dict()
    for name, tensor in state.policy.model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_export_of_a_step_without_a_state_lists_those_there_are(tmp_path):
    write_run(tmp_path, grpo_recipe())
    with pytest.raises(ValueError, match=r"--step is 7; accepted, as .*: 3 \(grpo\)"):
        choose_state(tmp_path, ["grpo"], 7)
    with pytest.raises(ValueError, match="has no saved state"):
        choose_state(tmp_path / "other", ["grpo"], None)


def test_export_refuses_another_start_a_taken_place_and_a_recipe(tmp_path, capsys):
    write_run(tmp_path / "run", grpo_recipe())
    (tmp_path / "run" / "inputs.json").write_text('{"model.path": "other"}')
    command = ["train", "--export-state", str(tmp_path / "run")]
    for more, text in (
        ([], "started from another checkpoint than"),
        (["--out", str(tmp_path / "run")], "which exists; accepted: a new or empty directory"),
        (["--set", "seed=1"], "leave out RECIPE and --set"),
    ):
        assert main([*command, *more]) == 2
        assert text in capsys.readouterr().err
    assert main(["train", "--export-state", str(tmp_path)]) == 2
    assert "has no recipe.json" in capsys.readouterr().err
    assert main(["train", "grpo_demo", "--step", "3"]) == 2
    assert "--step chooses a state for --export-state" in capsys.readouterr().err
