"""Backend comparison as one HTML page: tables of errors, and heat maps of the differences."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.artifacts import make_directory, write_text
from coprs_deploy.bundle import Bundle
from coprs_deploy.export.comparison import BackendComparison, Difference
from coprs_deploy.page import data_uri, render_page
from coprs_deploy.specs import IMAGE_ENCODER
from coprs_deploy.visualization import colorize

HEATMAP_PX = 176

STYLE = """
.maps { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
.map { width: 176px; } .map p { margin: 0; font-size: .8rem; line-height: 1.35; }
img { image-rendering: pixelated; width: 176px; height: 176px; border-radius: 4px; }
"""


def write_comparison_page(
    path: Path, bundle: Bundle, comparisons: Sequence[BackendComparison], num_samples: int
) -> None:
    """Write the comparison as one self-contained HTML page."""
    make_directory(path.parent)
    write_text(path, comparison_page_html(bundle, comparisons, num_samples))


def comparison_page_html(
    bundle: Bundle, comparisons: Sequence[BackendComparison], num_samples: int
) -> str:
    """Render the result of ``compare_backends`` as HTML without references to other files."""
    manifest = bundle.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items())
    if not all(comparison.passed for comparison in comparisons):
        verdict = '<span class="bad">outside tolerance</span>'
    elif all(comparison.has_tolerance for comparison in comparisons):
        verdict = '<span class="good">all within tolerance</span>'
    else:
        verdict = '<span class="good">all that have a tolerance are within it</span>'
    valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
    shapes = "landscape, portrait, square" if valid_region is None else str(valid_region)
    sections = "".join(_section(comparison) for comparison in comparisons)
    body = (
        f"<h1>Backend comparison: {verdict}</h1>"
        f"<p>Bundle {escape(bundle.path.name)}, checkpoint "
        f"{escape(manifest.checkpoint_fingerprint[:12])}, image {manifest.geometry.image_size} px; "
        f"{num_samples} images: {shapes}. Each graph alone is fed with the module's outputs of the "
        "graph before it; end to end, each backend runs on its own outputs. The relative error is "
        "the largest absolute difference over the largest absolute value of the reference; the "
        "mean error is signed and shows a one-sided shift.</p>"
        f"<p>Exported with {escape(versions)}.</p>{sections}"
    )
    return render_page(f"Backend comparison of {bundle.path.name}", body, style=STYLE)


def _section(comparison: BackendComparison) -> str:
    mark = '<span class="bad">failed</span>'
    if comparison.passed:
        mark = '<span class="good">passed</span>'
        if not comparison.has_tolerance:
            mark = "deliberately a different function, no tolerance"
    rows = "".join(_row(difference) for difference in comparison.differences)
    maps = "".join(_heatmap(difference) for difference in comparison.differences)
    names = f"{escape(comparison.reference)} &rarr; {escape(comparison.candidate)}"
    return (
        f"<h2>{names}: {mark}</h2><table><tr><th>graph</th>"
        "<th>max abs error</th><th>relative error</th><th>allowed</th><th>mean error</th>"
        "<th>cosine</th><th>mask IoU</th><th></th></tr>"
        f'{rows}</table><div class="maps">{maps}</div>'
    )


def _row(difference: Difference) -> str:
    record, allowed = difference.record, difference.allowed
    iou = "" if record.mask_iou is None else f"{record.mask_iou:.5f}"
    verdict = '<td class="good">ok</td>' if record.passed else '<td class="bad">failed</td>'
    limit = f"{allowed.relative_error:.0e}" if allowed.relative_error else "bit-exact"
    if not record.has_tolerance:
        limit, verdict = "", "<td>no tolerance</td>"
    return (
        f"<tr><td>{escape(record.graph)}</td><td>{record.max_abs_error:.2e}</td>"
        f"<td>{record.relative_error:.2e}</td><td>{limit}</td><td>{record.mean_error:+.1e}</td>"
        f"<td>{record.cosine:.8f}</td><td>{iou}</td>{verdict}</tr>"
    )


def _heatmap(difference: Difference) -> str:
    largest = float(difference.heatmap.max())
    scale = f"maximum {largest:.1e}" if largest else "no difference"
    name = f"{difference.record.graph}: {difference.output}"
    return (
        f'<div class="map"><img alt="{escape(name)}" src="'
        f'{_png(difference.heatmap)}"><p>{escape(name)}<br>{scale}</p></div>'
    )


def _png(heatmap: NDArray[np.float32]) -> str:
    """Render a heat map as PNG in a data URI, colored from 0 to its own maximum."""
    largest = float(heatmap.max()) or 1.0
    image = Image.fromarray(colorize(heatmap / largest).astype(np.uint8))
    if image.width < HEATMAP_PX:
        image = image.resize((HEATMAP_PX, HEATMAP_PX), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data_uri(data.getvalue(), "image/png")
