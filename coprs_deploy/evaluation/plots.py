"""Scatter plot of prior IoU against mask IoU with a regression band (paper, 4.3, fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import import_failure
from coprs_deploy.evaluation.metrics import pearson_r

BAND_WIDTH = 10.0
"""Factor eta of the confidence band (paper, section 4.3)."""

POINT, LINE, INK = "#2563eb", "#b91c1c", "#18181b"


def plot_correlation(path: Path, prior_iou: Sequence[float], mask_iou: Sequence[float]) -> None:
    """Write a plot of prior IoU against mask IoU with regression line, band and Pearson R.

    The values of each example are in [0, 1].
    """
    x, y = np.asarray(prior_iou), np.asarray(mask_iou)
    plt = pyplot()
    canvas, axes = plt.subplots(figsize=(5.4, 5))
    axes.scatter(x, y, s=9, alpha=0.3, color=POINT, linewidths=0)
    correlation = pearson_r(prior_iou, mask_iou)
    if correlation is not None and len(x) > 2:
        at = np.linspace(x.min(), x.max(), 100)
        line, half = regression_band(x, y, at)
        axes.plot(at, line, color=LINE, linewidth=1.6)
        axes.fill_between(at, line - half, line + half, alpha=0.15, color=LINE, linewidth=0)
        axes.set_title(f"Pearson R {correlation:.3f}, {len(x)} examples", fontsize=11)
    axes.set(xlabel="IoU of the prior", ylabel="IoU of the mask", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.tight_layout()
    canvas.savefig(path, dpi=120, format="png")
    plt.close(canvas)


def regression_band(
    x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit a line and the half-width of its confidence band (paper, section 4.3).

    Args:
        x: (N,) values.
        y: (N,) values.
        at: (M,) positions of the line and the band.

    Returns:
        The line, and ``eta * sigma * sqrt(1/n + (at - mean)^2 / sum((x - mean)^2))``.
    """
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    sigma = np.sqrt((residual**2).sum() / max(1, len(x) - 2))
    deviation = ((x - x.mean()) ** 2).sum()
    half = BAND_WIDTH * sigma * np.sqrt(1 / len(x) + (at - x.mean()) ** 2 / deviation)
    return slope * at + intercept, half


def pyplot() -> Any:
    """Import matplotlib.pyplot with the backend that writes files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise import_failure(error, "matplotlib", "pip install matplotlib") from error
    return plt
