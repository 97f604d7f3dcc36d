"""Scatter plots of correlations with regression line, band and Pearson R (paper, fig. 3 and 4).

A plot is drawn for light and for dark pages, in the colors of ``page.html``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coprs_deploy.errors import import_failure
from coprs_deploy.evaluation.metrics import pearson_r

BAND_WIDTH = 10.0
"""Factor eta of the confidence band (paper, section 4.3)."""

Scheme = Literal["light", "dark"]

COLORS: dict[Scheme, dict[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1c1d21", "points": "#2563eb", "line": "#b91c1c"},
    "dark": {"paper": "#14161a", "ink": "#e6e8ee", "points": "#7aa7ff", "line": "#ff8585"},
}

PANEL_INCHES = (5.4, 5.0)


@dataclass(frozen=True)
class Correlation:
    """Two values of each point.

    Attributes:
        x: values, at most 1.
        y: values, at most 1.
        x_label: meaning of the first value.
        y_label: meaning of the second value.
        unit: what a point is, in the plural.
    """

    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    unit: str = "examples"

    @property
    def pearson_r(self) -> float | None:
        """Pearson correlation; None if one of the values is constant."""
        return pearson_r(self.x, self.y)


def plot_correlation(path: Path, prior_iou: Sequence[float], mask_iou: Sequence[float]) -> None:
    """Write a plot of prior IoU against mask IoU with regression line, band and Pearson R.

    The values of each example are in [0, 1].
    """
    path.write_bytes(draw_correlations([prior_against_mask(prior_iou, mask_iou)]))


def prior_against_mask(prior_iou: Sequence[float], mask_iou: Sequence[float]) -> Correlation:
    """Return the correlation of the IoU of priors and masks, a point for each example."""
    return Correlation(prior_iou, mask_iou, "IoU of the prior", "IoU of the mask")


def draw_correlations(correlations: Sequence[Correlation], scheme: Scheme = "light") -> bytes:
    """Draw correlations side by side.

    Returns:
        A PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plt, colors = pyplot(), COLORS[scheme]
    width, height = PANEL_INCHES
    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
        colors["ink"],
    )
    papers = dict.fromkeys(("axes.facecolor", "savefig.facecolor"), colors["paper"])
    with plt.rc_context({**ink, **papers}):
        canvas, grid = plt.subplots(
            1, len(correlations), figsize=(width * len(correlations), height), squeeze=False
        )
        for axes, correlation in zip(grid.flat, correlations, strict=True):
            _draw(axes, correlation, colors)
        canvas.tight_layout()
        data = io.BytesIO()
        canvas.savefig(data, dpi=120, format="png")
        plt.close(canvas)
    return data.getvalue()


def _draw(axes: Any, correlation: Correlation, colors: dict[str, str]) -> None:
    x, y = np.asarray(correlation.x, float), np.asarray(correlation.y, float)
    crowding = max(1, len(x)) ** 0.5
    opacity, area = np.clip(20 / crowding, 0.15, 0.8), np.clip(300 / crowding, 8, 30)
    axes.scatter(x, y, s=area, alpha=opacity, color=colors["points"], linewidths=0)
    found = correlation.pearson_r
    if found is not None and len(x) > 2:
        at = np.linspace(x.min(), x.max(), 100)
        line, half = regression_band(x, y, at)
        axes.plot(at, line, color=colors["line"], linewidth=1.6)
        axes.fill_between(at, line - half, line + half, alpha=0.15, color=colors["line"], lw=0)
    shown = "undefined" if found is None else f"{found:.3f}"
    axes.set_title(f"Pearson R {shown}, {len(x):,} {correlation.unit}", fontsize=11)
    axes.set(xlabel=correlation.x_label, ylabel=correlation.y_label)
    axes.set_xlim(min([0.0, *x]), 1.02)  # 1 - BCE may be below 0
    axes.set_ylim(min([0.0, *y]), 1.02)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


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
