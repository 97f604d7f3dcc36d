"""Report of a run: page and plots."""

import pytest

from coprs_deploy.training.report import page, plot_stage, write_report
from coprs_deploy.training.run_directory import RunDirectory

STAGE = {
    "steps": 3,
    "seconds": 60.0,
    "thresholds": {"giou": {"required": 0.9, "value": 0.5, "passed": False}},
}


def report_of(stage):
    return {
        "recipe": {"description": "x", "seed": 0},
        "minutes": 1.0,
        "stages": {"one": stage},
    }


def test_page_of_a_missed_threshold_shows_it():
    assert "| one | 3 | 1.0 | giou | 0.9 | 0.5000 | **failed** |" in page(report_of(STAGE))


def test_page_of_a_grpo_stage_shows_metrics_before_and_after():
    stage = STAGE | {"metrics": {"reward": 0.7}, "init_metrics": {"before/reward": 0.5}}
    assert "| reward | 0.5000 | 0.7000 |" in page(report_of(stage))


def test_page_of_a_supervised_stage_shows_its_metrics_and_best_evaluation():
    stage = STAGE | {"metrics": {"giou": 0.7}, "best": {"step": 2, "value": 0.75}}
    text = page(report_of(stage))
    assert "teacher-forced, after one" in text
    assert "| giou | 0.7000 |" in text
    assert "Best evaluation of one: step 2, 0.7500." in text


def test_page_of_a_finished_model_shows_both_evaluations():
    metrics = {"generated": {"giou": 0.8, "pearson_r": 0.5}, "teacher_forced": {"giou": 0.9}}
    text = page(report_of(STAGE) | metrics)
    assert "| giou | 0.8000 | 0.9000 |" in text
    assert "| pearson r | 0.5000 | - |" in text


@pytest.mark.parametrize(
    "line",
    [
        {"loss": 1.0, "loss/language": 0.5, "loss/auxiliary.vision_head.color": 0.5},
        {"loss": 1.0, "reward": 0.5, "rewards/mask/mean": 0.5, "learning_rate/policy": 1e-6},
    ],
    ids=["supervised", "grpo"],
)
def test_plot_stage_writes_an_image(tmp_path, line):
    lines = [{"stage": "one", "step": step, **line} for step in (1, 2)]
    plot_stage(tmp_path / "one.png", "one", [*lines, {"stage": "one", "step": 2, "eval/giou": 0.5}])
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_write_report_plots_prior_against_mask(tmp_path):
    examples = [
        {"num_targets": targets, "prior_iou": iou, "mask_iou": iou / 2}
        for targets, iou in ((1, 0.8), (1, 0.4), (0, 0.0))
    ]
    write_report(RunDirectory(tmp_path), report_of(STAGE) | {"examples": examples})
    assert (tmp_path / "report.md").is_file()
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["prior_against_mask.png"]
