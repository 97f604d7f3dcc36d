"""The report of a run for people: a page of figures, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.evaluation.plots import plot_correlation, pyplot
from coprs_deploy.training.run_directory import RunDirectory

HEAD_COLORS = {"dense": "#c7d2da", "readout": "#e8cfa9"}
"""Of the losses of throw-away heads, by the first part of their names."""


def write_report(folder: RunDirectory, report: Mapping[str, Any]) -> None:
    """Write ``report.md`` and ``plots/`` into the folder of a run."""
    (folder.path / "report.md").write_text(page(report), encoding="utf-8")
    plots = folder.path / "plots"
    plots.mkdir(exist_ok=True)
    log = folder.read_log()
    for name in report["phases"]:
        lines = [x for x in log if x["phase"] == name]
        plot = plot_grpo_phase if any("reward" in line for line in lines) else plot_phase
        plot(plots / f"{name}.png", name, lines)
    present = [a for a in report.get("answers", []) if a["num_targets"]]
    if present:
        plot_correlation(
            plots / "prior_against_mask.png",
            [a["prior_iou"] for a in present],
            [a["mask_iou"] for a in present],
        )


def page(report: Mapping[str, Any]) -> str:
    """Lay the figures out as Markdown."""
    lines = [
        f"# {report['recipe']['description']}",
        "",
        f"Seed {report['recipe']['seed']}, {report['minutes']:.1f} minutes of training.",
        "",
        "| phase | steps | minutes | gate | wanted | found | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in report["phases"].items():
        start = f"| {name} | {result['steps']} | {result['seconds'] / 60:.1f} |"
        for gate, judged in result["gates"].items():
            found = "-" if judged["found"] is None else f"{judged['found']:.4f}"
            word = "passed" if judged["passed"] else "**missed**"
            lines.append(f"{start} {gate} | {judged['wanted']:g} | {found} | {word} |")
            start = "| | | |"
        if not result["gates"]:
            lines.append(f"{start} | | | |")
    for name, result in report["phases"].items():
        if "before/reward" in result.get("facts", {}):
            lines += before_and_after(name, result)
    if "generated" not in report:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Held-out scenes, weights as stored:",
        "",
        "| | generated | teacher-forced |",
        "|---|---|---|",
    ]
    fed = report["teacher_forced"]
    for figure, value in report["generated"].items():
        other = f"{fed[figure]:.4f}" if figure in fed else "-"
        lines.append(f"| {figure.replace('_', ' ')} | {value:.4f} | {other} |")
    return "\n".join(lines) + "\n"


def before_and_after(name: str, result: Mapping[str, Any]) -> list[str]:
    """Lay out what a GRPO phase changed on held-out examples, answered greedily."""
    lines = ["", f"Held-out examples, greedy answers, before and after {name}:", ""]
    lines += ["| | before | after |", "|---|---|---|"]
    for figure, after in result["metrics"].items():
        before = result["facts"][f"before/{figure}"]
        words = figure.replace("error.", "standard error of ").replace("_", " ")
        lines.append(f"| {words} | {before:.4f} | {after:.4f} |")
    return lines


def plot_phase(path: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the losses of a phase, and what it reached on held-out scenes."""
    losses = [line for line in lines if "loss" in line]
    looks = [line for line in lines if any(key.startswith("held_out.") for key in line)]
    if not losses:
        return
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    steps = [line["step"] for line in losses]
    labeled = set[str]()
    for key in [k for k in losses[0] if k == "loss" or k.startswith("loss.")]:
        values = [line.get(key, float("nan")) for line in losses]
        group, dot, _ = key.removeprefix("loss.").partition(".")
        label = key.removeprefix("loss.")
        style: dict[str, Any] = {"linewidth": 1.0}
        if key == "loss":
            style = {"color": "black", "linewidth": 1.8}
        elif dot and group in HEAD_COLORS:
            # Up to twenty heads, thrown away in the end: one color and one entry for each group.
            style = {"color": HEAD_COLORS[group], "linewidth": 0.6, "zorder": 1}
            label = "" if group in labeled else f"{group} heads"
            labeled.add(group)
        left.plot(steps, values, label=label, **style)
    left.set(xlabel="step", ylabel="loss", yscale="log", title=name)
    for key in sorted({k for line in looks for k in line if k.startswith("held_out.")}):
        label = key.removeprefix("held_out.")
        if "." in label:
            continue
        found = [(line["step"], line[key]) for line in looks if key in line]
        right.plot(*zip(*found, strict=True), marker="o", markersize=3, label=label)
    right.set(xlabel="step", title=f"{name}, held out", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward", "rewards/mask/mean", "rewards/format/mean", "eval/reward")),
    ("gIoU of masks and priors", ("giou", "prior_giou", "eval/giou")),
    ("losses", ("loss", "loss/policy", "loss/prior_bce", "loss/mask_dice", "loss/mask_focal")),
    ("divergence and entropy", ("kl", "entropy", "clip_ratio/region_mean")),
    ("gradient norm", ("grad_norm",)),
    ("learning rates", ("learning_rate/",)),
)
"""Title, and the figures of the log that are drawn; a name that ends in a slash stands for all."""


def plot_grpo_phase(path: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw everything that a GRPO phase logs, six panels on one picture."""
    plt = pyplot()
    figure, grid = plt.subplots(2, 3, figsize=(13, 7))
    for axes, (title, wanted) in zip(grid.flat, PANELS, strict=True):
        for key in sorted({k for line in lines for k in line if _is_wanted(k, wanted)}):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            is_look = key.startswith("eval/")
            style: dict[str, Any] = {"linewidth": 1.0}
            if is_look:
                style = {"marker": "o", "markersize": 4, "linewidth": 1.6}
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if title == "learning rates":
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_wanted(key: str, wanted: Sequence[str]) -> bool:
    return any(key.startswith(name) if name.endswith("/") else key == name for name in wanted)
