"""The regression band of the paper, on values made by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.evaluation.reports.plots import (
    COLORS,
    Correlation,
    draw_correlations,
    plot_correlation,
    regression_band,
)


def test_regression_band_is_narrowest_at_the_mean():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    y = 2 * x + np.array([0.1, -0.1, -0.1, 0.1])
    line, half = regression_band(x, y, x)
    assert line == pytest.approx(2 * x, abs=0.2)
    # sigma = sqrt(0.04 / 2); at the mean the band is eta * sigma / sqrt(n).
    _, at_mean = regression_band(x, y, np.array([1.5]))
    assert at_mean[0] == pytest.approx(10 * np.sqrt(0.02) / 2)
    assert (half > at_mean[0]).all()


@pytest.mark.parametrize("values", [[0.1, 0.5, 0.7], [0.5, 0.5], [0.5]])
def test_plot_correlation_of_any_values_writes_an_image(values, tmp_path):
    plot_correlation(tmp_path / "plot.png", values, values)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size[0] > 400


def test_draw_correlations_has_the_paper_of_each_scheme_and_a_panel_each():
    panels = [Correlation([0.1, 0.5, 0.9], [-0.2, 0.4, 1.0], "x", "y", "batches")] * 2
    sizes = set()
    for scheme, colors in COLORS.items():
        with Image.open(io.BytesIO(draw_correlations(panels, scheme))) as image:
            sizes.add(image.size)
            assert (
                "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((2, 2)))
                == (colors["paper"])
            )
    ((width, height),) = sizes
    assert width > 2 * height


def test_draw_correlations_is_the_same_each_time():
    panel = [Correlation([0.1, 0.5, 0.9], [0.2, 0.4, 1.0], "x", "y")]
    assert draw_correlations(panel) == draw_correlations(panel)
