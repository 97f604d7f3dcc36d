"""The curves of a GRPO phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coprs_deploy.evaluation.correlation import pyplot

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward", "reward.mask", "reward.format", "held_out.reward")),
    ("overlap with the truth", ("mask_iou", "prior_iou", "held_out.mask_iou")),
    ("losses", ("loss", "loss.policy", "loss.prior_bce", "loss.mask_dice", "loss.mask_focal")),
    ("divergence and entropy", ("kl", "entropy", "clip_fraction")),
    ("gradient norm", ("grad_norm",)),
    ("rates", ("rate.",)),
)
"""Title, and the figures of the log that are drawn; a name that ends in a dot stands for all."""


def plot_grpo_phase(path: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw everything that a GRPO phase logs, six panels on one picture."""
    plt = pyplot()
    figure, grid = plt.subplots(2, 3, figsize=(13, 7))
    for axes, (title, wanted) in zip(grid.flat, PANELS, strict=True):
        for key in sorted({k for line in lines for k in line if _is_wanted(k, wanted)}):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            is_look = key.startswith("held_out.")
            style: dict[str, Any] = {"linewidth": 1.0}
            if is_look:
                style = {"marker": "o", "markersize": 4, "linewidth": 1.6}
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if title == "rates":
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_wanted(key: str, wanted: Sequence[str]) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in wanted)
