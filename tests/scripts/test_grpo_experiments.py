"""The experiments: every run is one of the recipe, and the report says what was measured."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from coprs_deploy.demo import CHECKPOINT
from coprs_deploy.evaluation.metrics import standard_error
from coprs_deploy.training.grpo.experiment_report import write_experiment_report
from coprs_deploy.training.grpo.experiments import DAMAGED_FOLDER, damage
from coprs_deploy.training.grpo.planned_experiments import RECIPE, experiments
from coprs_deploy.training.recipe import load_recipe


def test_every_experiment_is_a_run_of_the_recipe():
    planned = experiments()
    assert len({e.name for e in planned}) == len(planned)
    for experiment in planned:
        recipe = load_recipe(RECIPE, [f"seed={experiment.seed}", *experiment.settings])
        phase = recipe.phases["grpo"]
        assert phase.global_batch_size * phase.num_generations == 32
    seeds = {e.seed for e in planned if (e.start, e.label) == ("damaged", "joint")}
    assert seeds == {0, 1}
    assert {e.label for e in planned} >= {"joint", "rl", "segmentation", "joint, groups of 2"}


@pytest.fixture
def ended_runs(tmp_path):
    """Two runs of one setting, written by hand: the gains are known."""
    generator = np.random.default_rng(0)
    before = generator.uniform(0.2, 0.8, 20)
    gains = generator.normal(0.1, 0.05, (2, 20))
    chosen = [e for e in experiments() if (e.start, e.label) == ("damaged", "joint")]
    for experiment, gain in zip(chosen, gains, strict=True):
        run = tmp_path / experiment.name
        folder = run / "held_out" / "grpo"
        folder.mkdir(parents=True)
        for step, values in ((0, before), (25, before + gain)):
            answers = [
                {"id": f"plain-{n}", "mask_iou": v, "reward": v / 2}
                for n, v in enumerate(values.tolist())
            ]
            order = generator.permutation(20)
            (folder / f"step-{step:06d}.json").write_text(
                json.dumps({"answers": [answers[n] for n in order]})
            )
        (run / "report.json").write_text(
            json.dumps({"phases": {"grpo": {"steps": 25, "seconds": 120.0}}})
        )
        (run / "environment.json").write_text(
            json.dumps({"machine": "a test", "versions": {"torch": "2"}})
        )
        (run / "log.jsonl").write_text(
            "".join(
                json.dumps({"step": n, "reward": 0.5, "reward_spread": 0.2, "kl": 0.01}) + "\n"
                for n in range(1, 26)
            )
        )
    return tmp_path, before, gains


def test_a_gain_has_the_error_of_its_difference(ended_runs, tmp_path):
    runs, before, gains = ended_runs
    (row,) = write_experiment_report(runs, tmp_path / "report")
    assert row.seeds == (0, 1)
    assert row.mask_iou.before == pytest.approx(before.mean())
    assert row.mask_iou.gain == pytest.approx(gains.mean())
    assert row.mask_iou.error == pytest.approx(standard_error(gains.mean(0).tolist()))
    assert row.mask_iou.by_seed == pytest.approx(gains.mean(1))
    assert row.reward.gain == pytest.approx(gains.mean() / 2)
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"{gains.mean():+.4f}" in page
    assert "more than twice its standard error" in page
    assert "mature-joint-0" in page, "what is missing is not named"
    assert (tmp_path / "report" / "curves.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["rows"][0]["mask_iou"]["gain"] == row.mask_iou.gain


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run has ended"):
        write_experiment_report(tmp_path, tmp_path / "report")


def test_the_damage_is_in_the_language_model_alone(tmp_path):
    out = tmp_path / DAMAGED_FOLDER
    damage(out)
    before = load_file(CHECKPOINT / "policy" / "model.safetensors")
    after = load_file(out / "policy" / "model.safetensors")
    changed = {n for n in after if not (after[n] == before[n].to(after[n].dtype)).all()}
    assert changed
    assert all("layers" in name and "visual" not in name for name in changed)
    masks = load_file(CHECKPOINT / "segmentation.safetensors")
    for name, tensor in load_file(out / "segmentation.safetensors").items():
        assert (tensor == masks[name].to(tensor.dtype)).all(), name
