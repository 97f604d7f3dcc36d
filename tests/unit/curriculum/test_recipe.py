"""Recipes: reading, changing, refusing; and the real sizes on the meta device."""

import functools
import math
from itertools import pairwise

import msgspec
import pytest
import torch

from coprs_deploy.cli.main import main
from coprs_deploy.training.optim import build_optimizers, relative_rate, set_rate
from coprs_deploy.training.recipe import Recipe, changed_keys, load_recipe, recipe_names
from coprs_deploy.training.run import build_on_meta, with_precision_of_this_machine
from coprs_deploy.training.settings import (
    PAPER_OPTIMIZER,
    CheckpointModel,
    ExampleData,
    GrpoSettings,
    Optimizer,
    SupervisedSettings,
)

GRPO_RECIPES = [name for name in recipe_names() if name.startswith("grpo_")]
REAL_SIZES = ["llava_13b", "llava_7b", "qwen2_5_vl_3b", "supervised_7b"]
PARAMETERS = {
    "llava_13b": 13.4e9,
    "llava_7b": 7.1e9,
    "qwen2_5_vl_3b": 3.75e9,
    "supervised_7b": 8.3e9,
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads_and_survives_json(name):
    recipe = load_recipe(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.phases


@pytest.mark.parametrize("name", ["demo", "full"])
def test_a_small_model_runs_its_phases_in_order(name):
    assert list(load_recipe(name).phases) == [
        "warm_up",
        "segmentation",
        "reasoning",
        "together",
    ]


@pytest.mark.parametrize(
    ("units", "expected"),
    [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_the_precision_is_that_of_the_machine(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **units})
    recipe = load_recipe("demo")
    assert recipe.precision == "auto"
    assert with_precision_of_this_machine(recipe).precision == expected
    chosen = load_recipe("demo", ["precision=bf16"])
    assert with_precision_of_this_machine(chosen) == chosen


def test_a_setting_changes_one_value():
    plain = load_recipe("demo")
    changed = load_recipe(
        "demo",
        [
            "phases.reasoning.steps=7",
            "data.preset=full",
            "phases.reasoning.optimizer.betas=[0.9, 0.99]",
            "phases.together.gates.mask_iou=0.5",
        ],
    )
    assert changed.phases["reasoning"].steps == 7
    assert changed_keys(plain, changed) == [
        "data.preset",
        "phases.reasoning.optimizer.betas",
        "phases.reasoning.steps",
        "phases.together.gates.mask_iou",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("phases.reasonin.steps=7", "did you mean phases.reasoning.steps"),
        ("phases.reasoning.step=7", "did you mean phases.reasoning.steps"),
        ("sed=1", "did you mean seed"),
        ("phases.reasoning.steps=many", "Expected `int`"),
        ("phases.reasoning.steps=0", "must be at least 1"),
        ("data.preset=plane", "Invalid enum value 'plane'"),
        ("seed", "takes key=value"),
        ("model.segmentation.policy_hidden_size=96", "must be equal"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_helps(setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", [setting])


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean shipped"):
        load_recipe("shiped")


def test_an_unknown_key_in_a_file_is_refused_with_the_nearest_name(tmp_path, write_recipe):
    path = tmp_path / "wrong.toml"
    path.write_text(write_recipe().read_text().replace("save_steps", "save_evry"))
    with pytest.raises(ValueError, match="did you mean save_steps"):
        load_recipe(str(path))


def test_the_command_line_lists_every_recipe(capsys):
    assert main(["train", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())


def test_the_command_line_refuses_an_unknown_key(capsys):
    assert main(["train", "demo", "--set", "phases.warm_up.stps=3"]) == 2
    assert "did you mean phases.warm_up.steps" in capsys.readouterr().err


def test_an_interrupted_run_says_how_it_goes_on(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("coprs_deploy.training.run.train", interrupted)
    out = str(tmp_path / "run")
    assert main(["train", "demo", "--set", "processes=1", "--out", out]) == 130
    message = capsys.readouterr().err
    assert f"the same command goes on from the last state in {out}" in message
    assert "every 100 steps" in message


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes_build_on_the_meta_device(name):
    recipe = load_recipe(name)
    assert isinstance(recipe.model, CheckpointModel)
    assert all(isinstance(phase, SupervisedSettings) for phase in recipe.phases.values())
    policy, segmentation = build_on_meta(recipe.model)
    count = sum(p.numel() for p in policy.parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=0.05)
    assert segmentation.config.policy_hidden_size == policy.get_output_embeddings().weight.shape[1]
    assert segmentation.config.sam.encoder_depth == 32


@functools.cache
def built_on_meta(policy, sam):
    return build_on_meta(CheckpointModel(path="x", policy=policy, sam=sam))


@pytest.mark.parametrize("name", [n for n in GRPO_RECIPES if n != "grpo_demo"])
def test_grpo_recipes_build_on_the_meta_device(name):
    recipe = load_recipe(name)
    assert isinstance(recipe.model, CheckpointModel)
    (phase,) = recipe.phases.values()
    assert isinstance(phase, GrpoSettings)
    policy, segmentation = built_on_meta(recipe.model.policy, recipe.model.sam)
    supervised = {"3b": "qwen2_5_vl_3b", "7b": "supervised_7b"}.get(
        recipe.model.policy, recipe.model.policy.replace("-", "_")
    )
    count = sum(p.numel() for p in policy.parameters())
    assert count == pytest.approx(PARAMETERS[supervised], rel=0.05)
    depth = {"vit_b": 12, "vit_l": 24, "vit_h": 32}[recipe.model.sam]
    assert segmentation.config.sam.encoder_depth == depth


def test_the_paper_is_the_default_of_every_setting():
    """A phase that sets nothing is the paper's."""
    phase = load_recipe("grpo_7b").phases["grpo"]
    plain = GrpoSettings(steps=phase.steps, global_batch_size=16)
    differing = {
        name
        for name in phase.__struct_fields__
        if getattr(phase, name) != getattr(plain, name) and name not in ("optimizer", "eval_steps")
    }
    assert differing == {"per_device_train_batch_size", "max_response_tokens"}
    assert phase.optimizer.floor == pytest.approx(PAPER_OPTIMIZER.floor, rel=1e-4)
    assert msgspec.structs.replace(phase.optimizer, floor=0) == msgspec.structs.replace(
        PAPER_OPTIMIZER, floor=0
    )


def test_the_ablations_of_figure_6_change_one_thing():
    paper = load_recipe("grpo_7b")
    for axis, key in {
        "group_2": "num_generations",
        "group_4": "num_generations",
        "group_16": "num_generations",
        "rl_only": "mode",
        "segmentation_only": "mode",
        "mask_weight_0": "reward.mask",
        "mask_weight_30": "reward.mask",
        "mask_weight_50": "reward.mask",
        "mask_weight_90": "reward.mask",
        "mask_weight_100": "reward.mask",
    }.items():
        changed = changed_keys(paper, load_recipe(f"grpo_7b_{axis}"))
        assert changed == ["description", f"phases.grpo.{key}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "grpo_shiped"', "base of .*did you mean grpo_shipped"),
        ("base = 3", "names another recipe"),
        ('base = "derived.toml"', "is its own base"),
        ('base = "grpo_demo"\n[phases.grpo]\ngroop_size = 2', "did you mean num_generations"),
        ('base = "grpo_demo"\n[phases.grpo]\ngroup_size = 1', "must be at least 2"),
        ('base = "grpo_demo"\n[phases.grpo]\nmode = "both"', "Invalid enum value"),
        ('base = "grpo_demo"\n[phases.grpo.optimizer]\nmuon = true', "muon = false"),
    ],
)
def test_a_wrong_derived_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "derived.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


def test_a_derived_recipe_keeps_what_it_does_not_name(tmp_path):
    (tmp_path / "one.toml").write_text('base = "grpo_demo"\n[phases.grpo]\ngroup_size = 4')
    (tmp_path / "two.toml").write_text(
        'base = "one.toml"\n[data]\nkind = "examples"\ntraining = "a"\nheld_out = "b"'
    )
    recipe, base = load_recipe(str(tmp_path / "two.toml")), load_recipe("grpo_demo")
    assert recipe.phases["grpo"].num_generations == 4
    assert recipe.phases["grpo"].optimizer == base.phases["grpo"].optimizer
    assert recipe.data == ExampleData("a", "b"), "a table of another kind is merged"


def test_rate_factors_reach_their_parts():
    recipe = load_recipe("qwen2_5_vl_3b")
    settings = recipe.phases["supervised"].optimizer
    _, segmentation = build_on_meta(recipe.model)
    (optimizer,) = build_optimizers(segmentation, settings)
    base = settings.rate
    peaks = {
        group["peak_rate"]: sum(p.numel() for p in group["params"])
        for group in optimizer.param_groups
    }
    assert set(peaks) == {base, 5 * base, 10 * base, 25 * base}
    assert peaks[25 * base] == sum(p.numel() for p in segmentation.prior.parameters())
    set_rate([optimizer], 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {p / 2 for p in peaks}


def test_the_rate_rises_stays_and_falls():
    settings = Optimizer(warmup_steps=10, lr_decay_ratio=0.5, floor=0.02)
    rates = [relative_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(rates[50:]))


def test_the_paper_schedule_is_a_cosine_without_rise():
    settings = load_recipe("supervised_7b").phases["supervised"].optimizer
    assert relative_rate(settings, 0, 1000) == pytest.approx(1.0)
    middle = settings.floor + (1 - settings.floor) / 2
    assert relative_rate(settings, 500, 1000) == pytest.approx(middle)
    assert relative_rate(settings, 1000, 1000) == pytest.approx(1 / 6.7, abs=1e-4)
    assert math.isfinite(relative_rate(settings, 999, 1000))
