"""A bundle of fakes in place of the demo model, and images on disk."""

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.batch import SegmentBatch, segment_batch


@pytest.fixture
def images(tmp_path):
    """Return a folder with five images that differ, one of them in a folder of its own."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "c.png", "d.png", "more/e.png")):
        pixels = np.full((20, 30, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture
def open_batch(build, monkeypatch):
    """Return a function that opens a SegmentBatch of fakes: the batch, its runners, its policy."""

    def opener(policy=None, encode=lambda: None, **options):
        coprs, runners = build(policy, encode)
        monkeypatch.setattr(segment_batch.CoPRS, "load", lambda *arguments: coprs)
        return SegmentBatch(**options), runners

    return opener
