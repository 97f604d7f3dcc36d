"""Report of a run for people: a Markdown page of metrics, and plots of every stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coprs_deploy.artifacts import write_text
from coprs_deploy.console import markdown_table
from coprs_deploy.evaluation.reports.plots import plot_correlation, pyplot
from coprs_deploy.training.recipe import RunSettings
from coprs_deploy.training.runs.diagnostics import warnings_of
from coprs_deploy.training.runs.gallery import gallery_lines, plain
from coprs_deploy.training.runs.progress import BEST_FILE, RESULT_FILE
from coprs_deploy.training.runs.run_directory import RunDirectory, threshold_results
from coprs_deploy.training.settings import StageSettings


class Panel(NamedTuple):
    """One panel of a stage's plot; a key that ends in a slash stands for all that start with it."""

    title: str
    keys: tuple[str, ...]
    is_log: bool = False
    limits: tuple[float, float] | None = None


SUPERVISED_PANELS = (
    Panel("loss", ("loss", "loss/"), is_log=True),
    Panel("evaluation", ("eval/",), limits=(0, 1.02)),
    Panel("gradient norm", ("grad_norm",), is_log=True),
    Panel("learning rate", ("learning_rate",)),
)

GRPO_PANELS = (
    Panel("reward", ("reward", "rewards/mask/mean", "rewards/format/mean", "eval/reward")),
    Panel("IoU with the ground truth", ("sampled_giou", "sampled_prior_giou", "eval/giou")),
    Panel("completions", ("completions/clipped_ratio", "frac_reward_zero_std"), limits=(0, 1.02)),
    Panel("completion length", ("completions/mean_length", "eval/completion_length")),
    Panel("loss", ("loss", "loss/policy", "loss/prior_bce", "loss/mask_dice", "loss/mask_focal")),
    Panel("divergence and entropy", ("kl", "entropy", "clip_ratio/region_mean")),
    Panel("gradient norm", ("grad_norm",), is_log=True),
    Panel("learning rate", ("learning_rate/",), is_log=True),
)


def write_report(
    directory: RunDirectory, report: Mapping[str, Any], stages: Mapping[str, StageSettings]
) -> None:
    """Write ``report.md`` and ``plots/`` into a run directory."""
    plots = directory.path / "plots"
    plots.mkdir(exist_ok=True)
    log = directory.read_log()
    lines = [page(report).rstrip("\n")]
    for name in report["stages"]:
        of_stage = [line for line in log if line["stage"] == name]
        lines += ["", f"## {name}"]
        if found := warnings_of(name, stages[name], of_stage):
            lines += ["", "Warnings:", "", *(f"- {plain(text)}" for text in found)]
        if plot_stage(plots / f"{name}.png", name, of_stage):
            lines += ["", f"![curves of {name}](plots/{name}.png)"]
        lines += gallery_lines(directory.path, name)
    with_target = [example for example in report.get("examples", []) if example["num_targets"]]
    if with_target:
        plot_correlation(
            plots / "prior_against_mask.png",
            [example["prior_iou"] for example in with_target],
            [example["mask_iou"] for example in with_target],
        )
        lines += ["", "![prior IoU against mask IoU](plots/prior_against_mask.png)"]
    write_text(directory.path / "report.md", "\n".join(lines) + "\n")


def write_running_report(directory: RunDirectory, recipe: RunSettings) -> None:
    """Write the report of a run that trains or was stopped, from its log and its results so far."""
    stages, log = recipe.all_stages(), directory.read_log()
    results = {}
    for name, settings in stages.items():
        lines = [each for each in log if each["stage"] == name and "seconds" in each]
        file = directory.stage(name) / RESULT_FILE
        if file.is_file():
            results[name] = json.loads(file.read_text(encoding="utf-8"))
        elif lines:
            results[name] = _result_so_far(directory.stage(name), settings, lines)
    if not results:
        return
    newest = list(results)[-1]
    position = f"{newest} has had {results[newest]['steps']} of {stages[newest].max_steps} steps"
    seconds = sum(result["seconds"] for result in results.values())
    report = {"recipe": recipe.to_json(), "minutes": seconds / 60, "stages": results}
    write_report(directory, report | {"position": position}, stages)


def _result_so_far(
    folder: Path, settings: StageSettings, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the result of a stage that has not ended, with the metrics of its last evaluation."""
    before, metrics = dict[str, float](), dict[str, float]()
    for line in lines:
        found = {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}
        if found and line["step"]:
            metrics = found
        elif found:
            before = {f"before/{name}": value for name, value in found.items()}
    steps, file = lines[-1]["step"], folder / BEST_FILE
    best = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        "is_finished": False,
        "steps": steps,
        "seconds": lines[-1]["seconds"],
        "metrics": metrics,
        "init_metrics": before,
        "best": best
        if best and best["step"] <= steps
        else {},  # a later one is from before a resume
        "thresholds": threshold_results(settings.thresholds, metrics),
    }


def page(report: Mapping[str, Any]) -> str:
    """Format the metrics as Markdown."""
    recipe, stages, position = report["recipe"], report["stages"], report.get("position")
    lines = [
        f"# {recipe['description']}",
        "",
        f"Seed {recipe['seed']}, {report['minutes']:.1f} minutes of training"
        f"{f', not finished: {position}' if position else ''}.",
        "",
        *markdown_table(
            ("stage", "steps", "minutes", "threshold", "required", "value", ""),
            [row for name, result in stages.items() for row in _stage_rows(name, result)],
        ),
    ]
    if "encoders" in report:
        lines += ["", *_encoder_table(report["encoders"])]
    for name, result in stages.items():
        before = result.get("init_metrics", {})
        if "before/reward" in before:
            lines += ["", f"Held-out examples, greedy decoding, before and after {name}:", ""]
            after = {f"before/{metric}": value for metric, value in result["metrics"].items()}
            lines += _comparison(("before", "after"), before, after)
        elif result.get("metrics") and "generated" not in report:
            how = "images" if "encoders" in report else "examples, teacher-forced"
            lines += ["", f"Held-out {how}, after {name}:", ""]
            shown = {m: v for m, v in result["metrics"].items() if "." not in m}
            lines += markdown_table(
                ("", "value"), [(_label(m), _number(v)) for m, v in shown.items()]
            )
        if result.get("best"):
            step, value = result["best"]["step"], result["best"]["value"]
            lines += ["", f"Best evaluation of {name}: step {step:g}, {value:.4f}."]
    if "generated" in report:
        lines += ["", "Held-out scenes, weights as stored:", ""]
        columns = ("generated", "teacher-forced")
        lines += _comparison(columns, report["generated"], report["teacher_forced"])
    return "\n".join(lines) + "\n"


def _encoder_table(encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the sizes of image encoders."""
    rows = [
        (
            role,
            cost["encoder"],
            f"{cost['image_size']}",
            f"{cost['parameters']:,}",
            f"{cost['multiply_adds'] / 1e6:,.1f} M",
        )
        for role, cost in encoders.items()
    ]
    return markdown_table(("", "image encoder", "input, px", "parameters", "multiply-adds"), rows)


def _stage_rows(name: str, result: Mapping[str, Any]) -> list[list[str]]:
    start = [name, str(result["steps"]), f"{result['seconds'] / 60:.1f}"]
    rows, missed = [], "**failed**" if result.get("is_finished", True) else "not yet"
    for metric, threshold in result["thresholds"].items():
        value = "-" if threshold["value"] is None else f"{threshold['value']:.4f}"
        verdict = "passed" if threshold["passed"] else missed
        rows.append([*start, metric, f"{threshold['required']:g}", value, verdict])
        start = ["", "", ""]
    return rows or [[*start, "", "", "", ""]]


def _comparison(
    header: tuple[str, str], first: Mapping[str, float], second: Mapping[str, float]
) -> list[str]:
    """Format metrics side by side."""
    rows = [
        (
            _label(metric.removeprefix("before/")),
            _number(value),
            _number(second.get(metric, math.nan)),
        )
        for metric, value in first.items()
    ]
    return markdown_table(("", *header), rows)


def plot_stage(path: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Plot the lines of the log of a stage; return whether it has any."""
    if not any("loss" in line for line in lines):
        return False
    is_grpo = any("reward" in line for line in lines)
    panels = GRPO_PANELS if is_grpo else SUPERVISED_PANELS
    plt, last_step = pyplot(), max(line["step"] for line in lines)
    rows, columns = 2, len(panels) // 2
    mpl_figure, grid = plt.subplots(rows, columns, figsize=(4.5 * columns + 1, 3.5 * rows + 0.5))
    for axes, panel in zip(grid.flat, panels, strict=True):
        for key in sorted({k for line in lines for k in line if _is_shown(k, panel)}):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), **_style(key))
        axes.set(xlabel="step", title=panel.title, yscale="log" if panel.is_log else "linear")
        axes.set_ylim(panel.limits)
        # One range in all panels, so that the legend has a place beside a single evaluation.
        axes.set_xlim(-0.05 * last_step, 1.05 * last_step)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    mpl_figure.suptitle(name)
    mpl_figure.tight_layout()
    mpl_figure.savefig(path, dpi=120)
    plt.close(mpl_figure)
    return True


def _style(key: str) -> dict[str, Any]:
    """Return label and style of a key of the log."""
    if key == "loss":
        return {"label": key, "color": "black", "linewidth": 1.8}
    if key.startswith("eval/"):
        return {"label": _label(key), "marker": "o", "markersize": 3, "linewidth": 1.4}
    if key.startswith("loss/") and "." in key:  # up to twenty auxiliary heads
        return {"color": "#c7d2da", "linewidth": 0.6, "zorder": 1}
    return {"label": _label(key), "linewidth": 1.0}


def _is_shown(key: str, panel: Panel) -> bool:
    if key.startswith("eval/") and "." in key:  # metrics of single question types
        return False
    return any(key.startswith(k) if k.endswith("/") else key == k for k in panel.keys)


def _number(value: float) -> str:
    """Format a metric; a dash for one that is undefined."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _label(key: str) -> str:
    return key.replace("_stderr", " standard error").replace("_", " ")
