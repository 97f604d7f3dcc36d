"""Memory estimates against measured peaks of tiny models, and estimates of real sizes."""

import json

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.curriculum.recipe import TinyPolicy
from coprs_deploy.curriculum.tiny_policy import build_tiny_policy
from coprs_deploy.data.examples import write_examples
from coprs_deploy.data.synthetic import PLAIN, SceneExamples
from coprs_deploy.model_config import SamConfig, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.specs import Geometry
from coprs_deploy.training.grpo.attachment import (
    Attachment,
    SegmentationHead,
    SegmentationRequest,
)
from coprs_deploy.training.planning.estimate import (
    GpuSpec,
    Workload,
    activation_bytes,
    estimate,
    model_sizes,
    resident_bytes,
)
from coprs_deploy.training.planning.estimate_page import (
    estimate_page,
    estimate_run,
    largest_directory,
)
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.settings import SupervisedSettings
from tests import ROOT

RECIPES = ROOT / "training" / "recipes"
VLLM_RECIPE = str(RECIPES / "grpo_7b_vllm.toml")
LLAVA_RECIPE = str(RECIPES / "grpo_llava_7b.toml")

PEAK_TOLERANCE = 0.15
"""Relative difference of an estimated peak: tensors are counted, not simulated."""


def build(width, depth):
    sizes = TinyPolicy(
        image_size=128,
        patch_size=8,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=3 * width,
        vision_hidden_size=64,
        vision_depth=2,
        vision_num_heads=2,
        vision_intermediate_size=128,
        mrope_section=(width // 32, width // 32, width // 8 - width // 16),
        vocab_size=600,
    )
    parts = build_tiny_policy(sizes, ["the red circle"], seed=0)
    sam = SamConfig(
        encoder_embed_dim=64,
        encoder_depth=1,
        encoder_num_heads=2,
        encoder_global_attn_indexes=(0,),
        window_size=8,
        mlp_ratio=2.0,
        decoder_num_heads=2,
        decoder_mlp_dim=128,
        geometry=Geometry(image_size=128, patch_size=8, out_chans=32),
    )
    return parts, SegmentationModel(SegmentationConfig(width, sam=sam))


def measure(parts, segmentation, rows, length, checkpointing):
    """Run one update and return the peak number of bytes held at once."""
    policy, tokenizer = parts.model, parts.tokenizer
    reference = tokenizer.convert_tokens_to_ids("<REF_POS>")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    head = SegmentationHead(segmentation)
    Attachment(policy, head, reference)
    policy.requires_grad_(True)  # the tracker supports no frozen weights
    if checkpointing:
        policy.gradient_checkpointing_enable()
    policy.train()
    start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    row = [start, *[image] * 64, end, *[5] * (length - 68), reference, 6]
    ids = torch.tensor([row] * rows)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, foreach=False)
    tracker = MemTracker()
    tracker.track_external(policy, optimizer)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).int(),
        "pixel_values": torch.randn(rows * 256, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 16, 16]] * rows),
    }
    request = SegmentationRequest(torch.randn(rows, 32, 16, 16), torch.ones(rows, 1, 64, 64), 66, 1)
    with tracker:
        for step in range(2):  # the second step starts with moments and gradients
            tracker.reset_mod_stats()
            output = policy(**inputs, segmentation=request, use_cache=False, logits_to_keep=1)
            loss = output.logits.float().pow(2).mean() + output.mask_logits.pow(2).mean()
            (loss + output.prior_logits.pow(2).mean()).backward()
            if step == 0:
                optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")
    return sum(total["Total"] for total in peak.values())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("width", "depth", "rows", "length", "checkpointing"),
    [
        (128, 2, 4, 100, False),
        (256, 4, 4, 120, True),
        # The tracker intercepts every operator: a minute per case.
        pytest.param(128, 4, 16, 160, False, marks=pytest.mark.extended),
        pytest.param(256, 6, 8, 200, False, marks=pytest.mark.extended),
        pytest.param(256, 6, 8, 200, True, marks=pytest.mark.extended),
    ],
)
def test_estimated_peak_equals_the_measured_one(width, depth, rows, length, checkpointing):
    parts, segmentation = build(width, depth)
    sizes = model_sizes(parts.model, segmentation)
    measured = measure(parts, segmentation, rows, length, checkpointing)
    work = Workload(
        rows=rows,
        rows_per_pass=rows,
        prompt_tokens=66,
        image_tokens=64,
        response_tokens=length - 66,
        checkpointing=checkpointing,
        has_features=True,
    )
    estimated = sum(resident_bytes(sizes, work).values()) + activation_bytes(sizes, work)
    assert estimated == pytest.approx(measured, rel=PEAK_TOLERANCE)


def test_cache_bytes_equal_the_measured_ones():
    parts, segmentation = build(128, 4)
    cache = parts.model.model.language_model(
        inputs_embeds=torch.zeros(3, 50, 128), use_cache=True
    ).past_key_values
    measured = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    assert model_sizes(parts.model, segmentation).language.cache_bytes(150) == 2 * measured


def test_estimate_divides_only_sharded_memory_by_the_gpus():
    one, eight = (estimate(load_recipe("grpo_7b"), n)["grpo"].memory for n in (1, 8))
    for part in ("policy", "reference"):
        assert one[part] == pytest.approx(8 * eight[part])
    assert one["segmentation"] == eight["segmentation"]
    assert one["optimizer"] == 2 * one["gradients"]
    assert one["policy"] == pytest.approx(4 * 8.29e9, rel=0.01)


@pytest.mark.parametrize("name", ["grpo_7b", VLLM_RECIPE, LLAVA_RECIPE])
def test_estimate_of_the_paper_fits_eight_gpus_and_not_one(name):
    recipe = load_recipe(name)
    assert estimate(recipe, 8)["grpo"].fits
    assert not estimate(recipe, 1)["grpo"].fits


def test_estimate_has_the_time_of_all_steps_and_the_disk():
    recipe = load_recipe("grpo_7b", ["stages.grpo.max_steps=3600"])
    one = estimate(recipe, 8)["grpo"]
    assert one.hours - one.evaluation_hours == pytest.approx(one.seconds["step"])
    assert one.evaluation_hours > 0
    checkpoint = one.disk["checkpoint"]
    assert checkpoint == pytest.approx(2 * 8.93e9, rel=0.01)
    states = one.disk["states to resume from"]
    assert states > 2 * 3 * 4 * 8.2e9
    assert one.disk["checkpoints while it runs"] == 3 * checkpoint  # two, and the best
    assert one.disk["peak"] == sum(one.disk.values()) - one.disk["peak"] + states / 2
    once = load_recipe(
        "grpo_7b", ["stages.grpo.eval_steps=0", "save_dtype=float32", "save_total_limit=1"]
    )
    other = estimate(once, 8)["grpo"]
    assert other.disk["checkpoint"] == other.disk["checkpoints while it runs"] == 2 * checkpoint
    assert other.disk["states to resume from"] == states / 2
    assert 0 < other.evaluation_hours < one.evaluation_hours


def test_estimate_with_vllm_has_no_gathering():
    slow = estimate(load_recipe("grpo_7b"), 8)["grpo"]
    fast = estimate(load_recipe(VLLM_RECIPE), 8)["grpo"]
    assert "gathering in the rollout" in slow.seconds
    assert "gathering in the rollout" not in fast.seconds
    assert slow.notes
    assert not fast.notes
    assert fast.seconds["step"] < slow.seconds["step"]


def test_estimate_with_features_has_no_image_encoder():
    without = load_recipe("grpo_7b")
    with_features = load_recipe("grpo_7b", ["data.features=features"])
    before, after = (estimate(recipe, 8)["grpo"] for recipe in (without, with_features))
    assert before.memory["segmentation"] - after.memory["segmentation"] > 2.4e9
    assert "image encoder" not in after.seconds


def test_estimate_of_a_supervised_stage_has_no_rollout():
    recipe = load_recipe(str(RECIPES / "supervised_3b.toml"))
    assert isinstance(recipe.stages["supervised"], SupervisedSettings)
    actual = estimate(recipe, 8)["supervised"]
    assert "rollout" not in actual.seconds
    assert actual.memory["reference"] == 0


def test_train_command_with_estimate_prints_it_and_exits_by_fit(capsys):
    assert main(["train", str(RECIPES / "grpo_3b.toml"), "--estimate", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    actual = shown["stages"]["grpo"]
    assert actual["fits"]
    assert shown["hours"] == actual["hours"]
    assert "checkpoints/qwen2_5_vl_3b does not exist" in shown["source"]
    assert len(shown["notes"]) == 2  # the data of the recipe do not exist
    assert actual["gpu"] == GpuSpec().to_json()
    assert main(["train", "grpo_7b", "--estimate", "--gpus", "1"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "computed, not measured" in text
    assert main(["train", "demo", "--estimate"]) == 2
    assert "model.kind" in capsys.readouterr().err
    missing = ["--set", "model.path=nowhere"]
    assert main(["train", "grpo_demo", "--estimate", *missing]) == 2
    assert "there is no checkpoint directory nowhere" in capsys.readouterr().err
    assert main(["train", LLAVA_RECIPE, "--estimate", "--gpus", "0"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu-memory", "0"), "--gpu-memory is 0.0; it must be above 0"),
        (("--gpu-memory", "nan"), "--gpu-memory is nan; accepted: a finite number"),
        (("--gpus", "7"), "not divisible by 7 processes"),
        (("--set", "save_steps=9", "--set", "stages.grpo.num_iterations=2"), "multiples of"),
        (("--set", "stages.grpo.thresholds.giou=93"), "the metric is at most 1"),
    ],
)
def test_estimate_of_a_run_that_cannot_be_names_the_setting(arguments, message, capsys):
    assert main(["train", "grpo_7b", "--estimate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_estimate_needs_no_package_of_the_training_machine(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert main(["train", VLLM_RECIPE, "--estimate"]) == 0
    assert "computed, not measured" in capsys.readouterr().out


def test_estimate_of_a_run_takes_the_sizes_of_its_checkpoint(tmp_path, tiny_checkpoint):
    """The names of sizes are for a checkpoint that is not there yet."""
    examples = list(SceneExamples(PLAIN, 3))
    for name in ("training", "held_out"):
        write_examples(tmp_path / f"{name}.jsonl", examples)
    (tmp_path / "recipe.toml").write_text(
        f'base = "supervised_7b"\n[model]\npath = "{tiny_checkpoint}"\n[data]\n'
        f'training = "{tmp_path}/training.jsonl"\nheld_out = "{tmp_path}/held_out.jsonl"\n'
    )
    found = estimate_run(load_recipe(str(tmp_path / "recipe.toml")), 1)
    checkpoint = read_checkpoint(tiny_checkpoint)
    stored = sum(
        file.stat().st_size
        for file in (
            checkpoint.path / "segmentation.safetensors",
            *checkpoint.policy_path.glob("*.safetensors"),
        )
    )
    assert found.source == f"sizes of {tiny_checkpoint}"
    assert not found.notes
    (one,) = found.stages.values()
    assert one.disk["weights of the finished stage"] == pytest.approx(stored, rel=0.25)
    geometry = checkpoint.config.model.geometry
    assert found.feature_bytes == 6 * 2 * geometry.out_chans * geometry.grid_size**2
    assert found.disk_bytes == one.disk["peak"]
    assert "all stages: " in estimate_page(found)


def test_largest_directory_keeps_the_weights_of_earlier_stages():
    one = estimate(load_recipe("grpo_7b"), 8)["grpo"]
    weights = one.disk["weights of the finished stage"]
    assert largest_directory({"a": one, "b": one}) == one.disk["peak"] + weights
