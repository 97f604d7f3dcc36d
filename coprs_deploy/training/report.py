"""The report of a run for people: a page of figures, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coprs_deploy.training.run_folder import RunFolder

BAND_WIDTH = 10.0
"""Factor eta on the confidence band of a regression line (paper, section 4.3)."""


def write_report(folder: RunFolder, report: Mapping[str, Any]) -> None:
    """Write ``report.md`` and ``plots/`` into the folder of a run."""
    (folder.path / "report.md").write_text(page(report), encoding="utf-8")
    plots = folder.path / "plots"
    plots.mkdir(exist_ok=True)
    log = folder.read_log()
    for name in report["phases"]:
        plot_phase(plots / f"{name}.png", name, [x for x in log if x["phase"] == name])
    if any(a["num_targets"] for a in report.get("answers", [])):
        plot_correlation(plots / "prior_against_mask.png", report["answers"])


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


def plot_phase(path: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the losses of a phase, and what it reached on held-out scenes."""
    losses = [line for line in lines if "loss" in line]
    looks = [line for line in lines if any(key.startswith("held_out.") for key in line)]
    if not losses:
        return
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    steps = [line["step"] for line in losses]
    for key in [k for k in losses[0] if k == "loss" or k.startswith("loss.")]:
        values = [line.get(key, float("nan")) for line in losses]
        style = {"color": "black", "linewidth": 1.6} if key == "loss" else {"linewidth": 0.8}
        left.plot(steps, values, label=key.removeprefix("loss."), **style)
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


def plot_correlation(path: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Draw the IoU of prior and mask of each answer, with regression line, band and Pearson R."""
    present = [a for a in answers if a["num_targets"]]
    x = np.array([a["prior_iou"] for a in present])
    y = np.array([a["mask_iou"] for a in present])
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.scatter(x, y, s=8, alpha=0.4)
    if len(present) > 2 and x.std() > 0 and y.std() > 0:
        at = np.linspace(x.min(), x.max(), 100)
        line, half = regression_band(x, y, at)
        axes.plot(at, line, color="black")
        axes.fill_between(at, line - half, line + half, alpha=0.2, color="gray")
        axes.set_title(f"Pearson R {np.corrcoef(x, y)[0, 1]:.3f}, {len(present)} answers")
    axes.set(xlabel="IoU of the prior", ylabel="IoU of the mask", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def regression_band(x: Any, y: Any, at: Any) -> tuple[Any, Any]:
    """Fit a line and the half-width of its mean confidence band (paper, section 4.3).

    Args:
        x: (N,) values.
        y: (N,) values.
        at: (M,) where line and band are wanted.

    Returns:
        The line, and ``eta * sigma * sqrt(1/n + (at - mean)^2 / sum((x - mean)^2))``.
    """
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    sigma = np.sqrt((residual**2).sum() / max(1, len(x) - 2))
    spread = ((x - x.mean()) ** 2).sum()
    half = BAND_WIDTH * sigma * np.sqrt(1 / len(x) + (at - x.mean()) ** 2 / spread)
    return slope * at + intercept, half


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
