"""Recipes: loading, overriding and refusing; the real sizes on the meta device."""

import functools
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from coprs_deploy.cli.main import main
from coprs_deploy.training.optim import build_optimizers, set_lr_factor
from coprs_deploy.training.planning.meta_models import build_on_meta
from coprs_deploy.training.recipe import Recipe, changed_keys, load_recipe, model_kind, recipe_names
from coprs_deploy.training.runs.run import resolve_precision
from coprs_deploy.training.settings import (
    PAPER_OPTIMIZER,
    CheckpointModel,
    ExampleData,
    GrpoSettings,
    SupervisedSettings,
)
from tests import ROOT

LAB_RECIPES = sorted(map(str, (ROOT / "training/recipes").glob("*.toml")))
CHECKPOINT_RECIPES = [
    *(name for name in recipe_names() if model_kind(name) == "checkpoint"),
    *LAB_RECIPES,
]
GRPO_RECIPES = [name for name in CHECKPOINT_RECIPES if "grpo" in name and name != "grpo_demo"]
SUPERVISED_RECIPES = [name for name in CHECKPOINT_RECIPES if "supervised" in name]
PARAMETERS = {"3b": 3.75e9, "7b": 8.3e9, "llava-7b": 7.1e9, "llava-13b": 13.4e9}
"""Parameters of each size of the policy."""


def lab(name):
    return str(ROOT / f"training/recipes/{name}.toml")


def recipe_id(source):
    return source.rpartition("/")[2].removesuffix(".toml")


@functools.cache
def built_on_meta(policy, sam):
    return build_on_meta(CheckpointModel(path="x", policy=policy, sam=sam))[:2]


@pytest.mark.parametrize("source", CHECKPOINT_RECIPES, ids=recipe_id)
def test_recipe_survives_json(source):
    recipe = load_recipe(source)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.stages


def test_package_has_the_recipes():
    supervised = ["full", "full_further", "full_truncated"]
    distill = ["distill", "distill_demo", "distill_masks"]
    checkpoint = ["grpo_7b", "grpo_demo", "supervised_7b"]
    assert recipe_names() == ["demo", "demo_truncated", *distill, *supervised, *checkpoint]


@pytest.mark.parametrize("source", LAB_RECIPES, ids=recipe_id)
def test_recipe_of_the_lab_names_a_base(source):
    assert Path(source).read_text(encoding="utf-8").startswith("base = ")


@pytest.mark.parametrize(
    ("units", "expected"),
    [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_resolve_precision_on_auto_takes_that_of_the_machine(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **units})
    recipe = load_recipe("grpo_demo")
    assert recipe.precision == "auto"
    assert resolve_precision(recipe).precision == expected
    fixed = load_recipe("grpo_demo", ["precision=bf16"])
    assert resolve_precision(fixed) == fixed


def test_load_recipe_with_settings_changes_these_values_only():
    settings = [
        "stages.grpo.max_steps=7",
        "data.preset=full",
        "stages.grpo.optimizer.betas=[0.9, 0.99]",
        "stages.grpo.thresholds.giou=0.5",
    ]
    plain, changed = load_recipe("grpo_demo"), load_recipe("grpo_demo", settings)
    assert changed.stages["grpo"].max_steps == 7
    assert list(changed_keys(plain.to_json(), changed.to_json())) == [
        "data.preset",
        "stages.grpo.max_steps",
        "stages.grpo.optimizer.betas",
        "stages.grpo.thresholds",
        "stages.grpo.thresholds.giou",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages.grop.max_steps=7", "did you mean stages.grpo.max_steps"),
        ("stages.grpo.max_step=7", "did you mean stages.grpo.max_steps"),
        ("sed=1", "did you mean seed"),
        ("stages.grpo.max_steps=many", "Expected `int`"),
        ("stages.grpo.max_steps=0", "Expected `int` >= 1"),
        ("save_steps=0", "Expected `int` >= 1"),
        ("num_threads=0", "Expected `int` >= 1"),
        ("num_processes=0", "Expected `int` >= 1"),
        ("seed=-1", "Expected `int` >= 0"),
        ("stages.grpo.optimizer.learning_rate=-1e-4", "Expected `float` > 0"),
        ("stages.grpo.optimizer.learning_rate=inf", "learning_rate is inf"),
        ("stages.grpo.optimizer.betas=[0.9, 1.0]", "Expected `float` < 1"),
        ("stages.grpo.optimizer.lr_multipliers.prior=-1", "Expected `float` >= 0"),
        ("stages.grpo.top_p=0", "Expected `float` > 0"),
        ("stages.grpo.temperature=nan", "temperature"),
        ("stages.grpo.lora.r=-1", "Expected `int` >= 0"),
        ("stages.grpo.thresholds.miou=0.2", "thresholds has 'miou'.*measures: .*giou"),
        ("data.num_training_scenes=0", "Expected `int` >= 1"),
        ("stages.grpo.kind=perception", "accepted: supervised, grpo"),
        ("data.preset=plane", "Invalid enum value 'plane'"),
        ("data.kind=scenes", "accepted: synthetic, examples"),
        ("seed", "takes key=value"),
    ],
)
def test_load_recipe_with_a_wrong_setting_raises(setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("grpo_demo", [setting])


def test_load_recipe_of_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean grpo_demo"):
        load_recipe("grpo_dmo")


def test_load_recipe_of_a_missing_file_says_so(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"recipe file .*mine\.toml does not exist"):
        load_recipe(str(tmp_path / "mine.toml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('base = "grpo_demo"')
    with pytest.raises(ValueError, match=r"did you mean mine\.toml"):
        load_recipe("mine")


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("stages.grpo", "steps = 3", "did you mean max_steps"),
        ("stages.grpo.optimizer", "rate = 3", "did you mean"),
        ("stages.grpo.optimizer", "foo = 3", "accepted: .*learning_rate"),
        ("data", "training_scenes = 3", "did you mean num_training_scenes"),
    ],
)
def test_unknown_key_of_a_table_names_one_of_the_same_table(tmp_path, table, line, message):
    path = tmp_path / "derived.toml"
    path.write_text(f'base = "grpo_demo"\n[{table}]\n{line}')
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(str(path))
    assert "save_steps" not in str(error.value).replace("eval_steps", "")


@pytest.mark.parametrize("recipe", ["demo", "full"])
def test_threshold_of_an_unknown_metric_of_the_tiny_model_is_refused(recipe, capsys):
    assert main(["train", recipe, "--set", "stages.joint.thresholds.miou=0.2"]) == 2
    assert "thresholds has 'miou'" in capsys.readouterr().err


def test_load_recipe_of_another_model_kind_names_the_accepted_one():
    with pytest.raises(ValueError, match="accepted: checkpoint"):
        load_recipe("demo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "grpo_dmo"', "base of .*did you mean grpo_demo"),
        ("base = 3", "must be the name or path of a recipe"),
        ('base = "derived.toml"', "is its own base"),
        ('base = "grpo_demo"\n[stages.grpo]\nnum_generation = 2', "did you mean num_generations"),
        ('base = "grpo_demo"\n[stages.grpo]\nnum_generations = 1', "Expected `int` >= 2"),
        ('base = "grpo_demo"\n[stages.grpo]\nmode = "both"', "Invalid enum value"),
        ('base = "grpo_demo"\n[stages.grpo.optimizer]\nname = "muon"', "'adamw'"),
    ],
)
def test_load_recipe_of_a_wrong_derived_file_raises(tmp_path, text, message):
    path = tmp_path / "derived.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


def test_load_recipe_of_a_derived_file_keeps_the_other_values(tmp_path):
    (tmp_path / "one.toml").write_text('base = "grpo_demo"\n[stages.grpo]\nnum_generations = 4')
    (tmp_path / "two.toml").write_text(
        'base = "one.toml"\n[data]\nkind = "examples"\ntraining = "a"\nheld_out = "b"'
    )
    recipe, base = load_recipe(str(tmp_path / "two.toml")), load_recipe("grpo_demo")
    assert recipe.stages["grpo"].num_generations == 4
    assert recipe.stages["grpo"].optimizer == base.stages["grpo"].optimizer
    assert recipe.data == ExampleData("a", "b"), "a table of another kind is replaced"


@pytest.mark.parametrize("source", SUPERVISED_RECIPES, ids=recipe_id)
def test_supervised_recipe_builds_on_the_meta_device(source):
    recipe = load_recipe(source)
    assert all(isinstance(stage, SupervisedSettings) for stage in recipe.stages.values())
    policy, segmentation = built_on_meta(recipe.model.policy, recipe.model.sam)
    count = sum(p.numel() for p in policy.parameters())
    assert count == pytest.approx(PARAMETERS[recipe.model.policy], rel=0.05)
    hidden_size = policy.get_output_embeddings().weight.shape[1]
    assert segmentation.config.policy_hidden_size == hidden_size
    assert segmentation.config.sam.encoder_depth == 32


@pytest.mark.parametrize("source", GRPO_RECIPES, ids=recipe_id)
def test_grpo_recipe_builds_on_the_meta_device(source):
    recipe = load_recipe(source)
    (stage,) = recipe.stages.values()
    assert isinstance(stage, GrpoSettings)
    policy, segmentation = built_on_meta(recipe.model.policy, recipe.model.sam)
    count = sum(p.numel() for p in policy.parameters())
    assert count == pytest.approx(PARAMETERS[recipe.model.policy], rel=0.05)
    depth = {"vit_b": 12, "vit_l": 24, "vit_h": 32}[recipe.model.sam]
    assert segmentation.config.sam.encoder_depth == depth


def test_build_on_meta_of_an_unknown_size_names_the_accepted_ones():
    with pytest.raises(ValueError, match=r"model\.sam is 'vit_x'; accepted: .*vit_h"):
        build_on_meta(CheckpointModel(path="x", policy="7b", sam="vit_x"))


def test_grpo_settings_default_to_the_paper():
    stage = load_recipe("grpo_7b").stages["grpo"]
    plain = GrpoSettings(max_steps=stage.max_steps, global_batch_size=16)
    differing = {
        name
        for name in stage.__struct_fields__
        if getattr(stage, name) != getattr(plain, name) and name not in ("optimizer", "eval_steps")
    }
    assert differing == {"per_device_train_batch_size", "max_completion_length"}
    assert stage.optimizer.min_lr_ratio == pytest.approx(PAPER_OPTIMIZER.min_lr_ratio, rel=1e-4)
    assert msgspec.structs.replace(stage.optimizer, min_lr_ratio=0) == msgspec.structs.replace(
        PAPER_OPTIMIZER, min_lr_ratio=0
    )


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("group_2", ["num_generations"]),
        ("group_4", ["num_generations"]),
        ("group_16", ["num_generations"]),
        ("rl_only", ["mode"]),
        ("segmentation_only", ["mode"]),
        ("mask_weight_0", ["reward_weights.format", "reward_weights.mask"]),
        ("mask_weight_30", ["reward_weights.format", "reward_weights.mask"]),
        ("mask_weight_50", ["reward_weights.format", "reward_weights.mask"]),
        ("mask_weight_90", ["reward_weights.format", "reward_weights.mask"]),
        ("mask_weight_100", ["reward_weights.format", "reward_weights.mask"]),
    ],
)
def test_ablation_recipe_changes_one_thing(name, keys):
    paper, ablation = load_recipe("grpo_7b"), load_recipe(lab(f"grpo_7b_{name}"))
    changed = list(changed_keys(paper.to_json(), ablation.to_json()))
    assert changed == ["description", *(f"stages.grpo.{key}" for key in keys)]


def test_lr_multipliers_reach_their_parts():
    recipe = load_recipe(lab("supervised_3b"))
    settings = recipe.stages["supervised"].optimizer
    segmentation = build_on_meta(recipe.model).segmentation
    (optimizer,) = build_optimizers(segmentation, settings)
    base = settings.learning_rate
    peaks = {
        group["peak_lr"]: sum(p.numel() for p in group["params"])
        for group in optimizer.param_groups
    }
    assert set(peaks) == {base, 5 * base, 10 * base, 25 * base}
    assert peaks[25 * base] == sum(p.numel() for p in segmentation.prior.parameters())
    set_lr_factor([optimizer], 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {p / 2 for p in peaks}


def test_train_list_imports_neither_torch_nor_trl():
    code = (
        "import sys; from coprs_deploy.cli.main import main; main(['train', '--list']); "
        "print('LOADED', sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.splitlines()[-1] == "LOADED []"
    assert all(name in shown for name in recipe_names())


def test_train_with_an_unknown_key_suggests_the_nearest(capsys):
    assert main(["train", "demo", "--set", "stages.perception.max_stps=3"]) == 2
    assert "did you mean stages.perception.max_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "function"),
    [
        ("grpo_demo", "coprs_deploy.training.runs.run.train"),
        ("demo", "coprs_deploy.curriculum.run.train_curriculum"),
    ],
)
def test_train_interrupted_says_what_is_kept(recipe, function, capsys, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    out = tmp_path / "run"
    command = ["train", recipe, "--set", "num_processes=1", "--out", str(out)]
    assert main(command) == 130
    assert f"no state was saved in {out}" in capsys.readouterr().err
    state = out / "stages" / "one" / "state-000020"
    state.mkdir(parents=True)
    assert main(command) == 130
    message = capsys.readouterr().err
    assert f"{state} is kept; re-run the same command to resume from it" in message
    assert f"train --export-state {out}" in message


def test_train_estimate_of_a_tiny_model_is_refused(capsys):
    assert main(["train", "demo", "--estimate"]) == 2
    assert "model.kind is 'tiny'" in capsys.readouterr().err
