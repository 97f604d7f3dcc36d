"""Report of a run: page and plots."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.data.examples import Example
from coprs_deploy.evaluation.reports.plots import pyplot
from coprs_deploy.training.recipe import load_recipe
from coprs_deploy.training.runs.gallery import TILE_PX, Sample, write_gallery
from coprs_deploy.training.runs.report import (
    page,
    plot_stage,
    write_report,
    write_running_report,
)
from coprs_deploy.training.runs.run_directory import RunDirectory
from coprs_deploy.training.settings import GrpoSettings, SupervisedSettings

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


def test_legend_hides_no_point_of_a_single_evaluation(tmp_path, monkeypatch):
    plt = pyplot()
    monkeypatch.setattr(plt, "close", lambda drawn: None)
    lines = [{"stage": "one", "step": step, "loss": 1.0} for step in range(10, 101, 10)]
    names = [f"eval/no_reasoning_precision_at_{n}" for n in range(5, 100, 8)]
    values = {name: (n + 0.5) / len(names) for n, name in enumerate(names)}
    plot_stage(tmp_path / "one.png", "one", [*lines, {"stage": "one", "step": 100, **values}])
    drawn = plt.gcf()
    (axes,) = (each for each in drawn.axes if each.get_title() == "evaluation")
    legend = axes.get_legend().get_tightbbox()
    points = axes.transData.transform([(100, value) for value in values.values()])
    hidden = [tuple(point) for point in points if legend.contains(*point)]
    monkeypatch.undo()
    plt.close(drawn)
    assert not hidden


def test_write_report_plots_prior_against_mask(tmp_path):
    examples = [
        {"num_targets": targets, "prior_iou": iou, "mask_iou": iou / 2}
        for targets, iou in ((1, 0.8), (1, 0.4), (0, 0.0))
    ]
    settings = {"one": SupervisedSettings(max_steps=3)}
    write_report(RunDirectory(tmp_path), report_of(STAGE) | {"examples": examples}, settings)
    assert (tmp_path / "report.md").is_file()
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["prior_against_mask.png"]


def test_running_report_has_the_last_evaluation_and_the_position(tmp_path):
    """Results of ended stages are kept, best evaluations from before a resume are not."""
    recipe = load_recipe("grpo_demo", ["stages.grpo.thresholds.giou=0.9"])
    directory, folder = RunDirectory(tmp_path), tmp_path / "stages" / "grpo"
    write_running_report(directory, recipe)
    assert not (tmp_path / "report.md").exists()
    folder.mkdir(parents=True)
    (folder / "best.json").write_text('{"step": 2, "value": 0.75}')
    for step, line in (
        (0, {"eval/reward": 0.25, "eval/giou": 0.5}),
        (1, {"loss": 1.0, "reward": 0.5}),
        (1, {"eval/reward": 0.75, "eval/giou": 0.625}),
        (2, {"loss": 0.5, "reward": 0.5}),
    ):
        write_running_report(directory, recipe)
        directory.log({"stage": "grpo", "step": step, "seconds": 60.0 * step, **line})
        directory.log({"stage": "grpo", "step": step, "changed": {"seed": [0, 1]}})
    text = (tmp_path / "report.md").read_text()
    assert "1.0 minutes of training, not finished: grpo has had 1 of 25 steps." in text
    assert "| grpo | 1 | 1.0 | giou | 0.9 | 0.6250 | not yet |" in text
    assert "| giou | 0.5000 | 0.6250 |" in text
    assert "Best evaluation" not in text
    write_running_report(directory, recipe)
    text = (tmp_path / "report.md").read_text()
    assert "grpo has had 2 of 25 steps" in text
    assert "Best evaluation of grpo: step 2, 0.7500." in text
    assert (tmp_path / "plots" / "grpo.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "report.json").exists(), "it marks the end"


def test_sample_counts_no_ignored_pixel_in_its_iou():
    masks, ignored = np.zeros((2, 1, 40, 60), np.bool_)
    masks[0, :, :20], ignored[0, :, 15:30] = True, True
    image = np.zeros((40, 60, 3), np.uint8)
    prediction = masks.copy()
    prediction[0, :, 20:30] = True
    found = [
        Sample(Example("7", image, "it", masks, ignore_mask=each), "", "", None, prediction, 0, 0)
        for each in (ignored[0], None)
    ]
    assert [sample.mask_iou for sample in found] == [1, pytest.approx(20 / 30)]


def test_page_shows_a_dash_for_an_undefined_metric():
    assert "| reward | - | 0.7000 |" in page(
        report_of(STAGE | {"metrics": {"reward": 0.7}, "init_metrics": {"before/reward": math.nan}})
    )


def test_write_report_shows_curves_warnings_and_gallery(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        line = {"loss": 1.0, "reward": 0.5, "completions/clipped_ratio": 0.75}
        directory.log({"stage": "one", "step": step, **line})
    image = np.zeros((40, 60, 3), np.uint8)
    masks = np.zeros((1, 40, 60), np.bool_)
    masks[0, 10:20, 10:20] = True
    example = Example("7", image, "the <left> *cup*", masks, "")
    nothing = Sample(example, "nothing", "I see nothing", None, masks[:0], 0.1, 0.2)
    write_gallery(tmp_path, "one", 3, [nothing])
    write_report(directory, report_of(STAGE), {"one": GrpoSettings(max_steps=3)})
    text = (tmp_path / "report.md").read_text()
    assert "- Step 3: 75% of the completions in the last 3 lines were cut off" in text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / name).is_file()
    assert "plots/one.png" in text
    assert "**the &lt;left> \\*cup\\*** (7): IoU 0.00, reward 0.10, format 0.20, 0 of 1" in text
    assert "> I see nothing" in text
    drawn = Image.open(tmp_path / "gallery" / "one" / "00.png")
    centers = [drawn.getpixel((TILE_PX * n + TILE_PX // 2, TILE_PX // 2)) for n in (2, 3)]
    assert centers == [(128, 128, 128)] * 2, "a prior or mask was invented"
