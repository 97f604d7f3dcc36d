"""The chain of equality as one HTML page: a table of links, and where two places differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coprs_deploy.bundle import Bundle
from coprs_deploy.export.comparison import BackendComparison, Difference
from coprs_deploy.specs import IMAGE_ENCODER
from coprs_deploy.visualization import colorize

HEATMAP_PX = 176

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d22; --soft: #666; --line: #d8d8de; --bg: #fff;
  --good: #0a7a33; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #a0a0aa; --line: #3a3a42;
  --bg: #17171b; --good: #5fd38a; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--bg);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.maps { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
figure { margin: 0; width: 176px; } figcaption { font-size: .8rem; line-height: 1.35; }
img { image-rendering: pixelated; width: 176px; height: 176px; border-radius: 4px; }
"""


def write_chain_page(
    path: Path, bundle: Bundle, links: Sequence[BackendComparison], num_samples: int
) -> None:
    """Write the chain as one HTML page that stands alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chain_page(bundle, links, num_samples), encoding="utf-8")


def chain_page(bundle: Bundle, links: Sequence[BackendComparison], num_samples: int) -> str:
    """Write the page.

    Args:
        bundle: whose graphs were compared.
        links: what was measured.
        num_samples: pictures that every place was given.

    Returns:
        HTML without a reference to any other file.
    """
    manifest = bundle.manifest
    passed, has_tolerance = (
        all(link.passed for link in links),
        all(link.has_tolerance for link in links),
    )
    versions = ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items())
    verdict = (
        f'<span class="good">every {"" if has_tolerance else "has_tolerance "}link holds</span>'
        if passed
        else '<span class="bad">a link is broken</span>'
    )
    valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
    shapes = "landscape, portrait, square" if valid_region is None else str(valid_region)
    sections = "".join(_section(link) for link in links)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Equality of {escape(bundle.path.name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Equality as a chain: {verdict}</h1>"
        f"<p>Bundle {escape(bundle.path.name)}, checkpoint "
        f"{escape(manifest.checkpoint_fingerprint[:12])}, image {manifest.geometry.image_size} px; "
        f"{num_samples} pictures: {shapes}. A stage alone is fed with the "
        "module's outputs of the stage before; end to end, each place runs on its own. Relative "
        "is the largest difference over the largest value of the reference; the mean keeps its "
        f"sign, so that a shift shows.</p><p>Exported with {escape(versions)}.</p>"
        f"{sections}</body></html>\n"
    )


def _section(link: BackendComparison) -> str:
    mark = '<span class="good">holds</span>' if link.passed else '<span class="bad">broken</span>'
    if link.passed and not link.has_tolerance:
        mark = "another function on purpose, not judged"
    rows = "".join(_row(difference) for difference in link.differences)
    maps = "".join(_figure(difference) for difference in link.differences)
    return (
        f"<h2>{escape(link.first)} &rarr; {escape(link.second)}: {mark}</h2>"
        '<div class="wide"><table><tr><th>stage</th><th>largest</th><th>relative</th>'
        "<th>allowed</th><th>mean</th><th>cosine</th><th>mask IoU</th><th></th></tr>"
        f'{rows}</table></div><div class="maps">{maps}</div>'
    )


def _row(difference: Difference) -> str:
    record, allowed = difference.record, difference.allowed
    iou = "" if record.mask_iou is None else f"{record.mask_iou:.5f}"
    verdict = '<td class="good">ok</td>' if record.passed else '<td class="bad">failed</td>'
    limit = f"{allowed.relative_error:.0e}" if allowed.relative_error else "bitwise"
    if not record.has_tolerance:
        limit, verdict = "", "<td>not judged</td>"
    return (
        f"<tr><td>{escape(record.graph)}</td><td>{record.max_abs_error:.2e}</td>"
        f"<td>{record.relative_error:.2e}</td><td>{limit}</td><td>{record.mean_error:+.1e}</td>"
        f"<td>{record.cosine:.8f}</td><td>{iou}</td>{verdict}</tr>"
    )


def _figure(difference: Difference) -> str:
    largest = float(difference.heatmap.max())
    scale = f"bright is {largest:.1e}" if largest else "no difference at all"
    name = f"{difference.record.graph}: {difference.output}"
    return (
        f'<figure><img alt="{escape(name)}" src="data:image/png;base64,'
        f'{_png(difference.heatmap)}"><figcaption>{escape(name)}<br>{scale}</figcaption></figure>'
    )


def _png(heatmap: NDArray[np.float32]) -> str:
    """Color a heatmap from 0 to its own largest value."""
    largest = float(heatmap.max()) or 1.0
    picture = Image.fromarray(colorize(heatmap / largest).astype(np.uint8))
    if picture.width < HEATMAP_PX:
        picture = picture.resize((HEATMAP_PX, HEATMAP_PX), Image.Resampling.NEAREST)
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")
