"""The GRPO experiments: planned runs, their report and the damaged checkpoint."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.evaluation.metrics import standard_error
from coprs_deploy.training.recipe import load_recipe
from tests.scripts import load_script

script = load_script("training/grpo_experiments.py")


def test_experiments_are_runs_of_the_recipe_with_equal_completions():
    planned = script.experiments()
    assert len({e.name for e in planned}) == len(planned)
    for experiment in planned:
        recipe = load_recipe(script.RECIPE, [f"seed={experiment.seed}", *experiment.settings])
        stage = recipe.stages["grpo"]
        assert stage.global_batch_size * stage.num_generations == script.COMPLETIONS
    seeds = {e.seed for e in planned if (e.start, e.label) == ("damaged", "joint")}
    assert seeds == {0, 1}
    assert {e.label for e in planned} >= {"joint", "rl", "segmentation", "joint, groups of 2"}


@pytest.fixture
def finished_runs(tmp_path):
    """Two runs of one setting, written by hand with known gains."""
    generator = np.random.default_rng(0)
    before = generator.uniform(0.2, 0.8, 20)
    gains = generator.normal(0.1, 0.05, (2, 20))
    chosen = [e for e in script.experiments() if (e.start, e.label) == ("damaged", "joint")]
    for experiment, gain in zip(chosen, gains, strict=True):
        run = tmp_path / experiment.name
        directory = run / "held_out" / "grpo"
        directory.mkdir(parents=True)
        for step, values in ((0, before), (25, before + gain)):
            examples = [
                {"id": f"plain-{n}", "mask_iou": v, "reward": v / 2}
                for n, v in enumerate(values.tolist())
            ]
            order = generator.permutation(20)
            (directory / f"step-{step:06d}.json").write_text(
                json.dumps({"examples": [examples[n] for n in order]})
            )
        (run / "report.json").write_text(
            json.dumps({"stages": {"grpo": {"steps": 25, "seconds": 120.0}}})
        )
        (run / "environment.json").write_text(
            json.dumps({"machine": "a test", "versions": {"torch": "2"}})
        )
        (run / "log.jsonl").write_text(
            "".join(
                json.dumps({"step": n, "reward": 0.5, "reward_std": 0.2, "kl": 0.01}) + "\n"
                for n in range(1, 26)
            )
        )
    return tmp_path, before, gains


def test_report_of_finished_runs_has_the_standard_error_of_the_difference(finished_runs, tmp_path):
    runs, before, gains = finished_runs
    reports = tmp_path / "report"
    assert script.main([str(runs), "--reports", str(reports), "--only-report"]) == 0
    (row,) = json.loads((reports / "report.json").read_text())["rows"]
    assert row["seeds"] == [0, 1]
    assert row["giou"]["before"] == pytest.approx(before.mean())
    assert row["giou"]["gain"] == pytest.approx(gains.mean())
    assert row["giou"]["stderr"] == pytest.approx(standard_error(gains.mean(0).tolist()))
    assert row["giou"]["by_seed"] == pytest.approx(gains.mean(1))
    assert row["reward"]["gain"] == pytest.approx(gains.mean() / 2)
    assert row["minutes"] == [2, 2]
    assert (row["kl"], row["reward_std"]) == pytest.approx((0.01, 0.2))
    page = (reports / "report.md").read_text()
    assert f"{gains.mean():+.4f}" in page
    assert "standard errors, significant" in page
    assert "mature-joint-0" in page, "unfinished runs are not listed"
    assert (reports / "curves.png").stat().st_size > 10_000


def test_report_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        script.write_experiment_report(tmp_path, tmp_path / "report")


def test_damaged_checkpoint_differs_in_the_language_model_only(tmp_path):
    out = tmp_path / script.DAMAGED_DIRECTORY
    script.write_damaged_checkpoint(out)
    before = load_file(CHECKPOINT / "policy" / "model.safetensors")
    after = load_file(out / "policy" / "model.safetensors")
    changed = {n for n in after if not (after[n] == before[n].to(after[n].dtype)).all()}
    assert changed
    assert all("layers" in name and "visual" not in name for name in changed)
    masks = load_file(CHECKPOINT / "segmentation.safetensors")
    for name, tensor in load_file(out / "segmentation.safetensors").items():
        assert (tensor == masks[name].to(tensor.dtype)).all(), name
