"""Dropped padding on the demo model: a small loss."""

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]

dropped_padding = load_script("benchmarks/dropped_padding.py")


@pytest.mark.slow
def test_dropped_padding_keeps_the_demo_models_masks():
    metrics = dropped_padding.evaluate_dropped_padding(24)
    assert metrics["scenes"] == 24
    assert metrics["giou_with_padding"] > 0.9
    assert metrics["giou_without_padding"] > metrics["giou_with_padding"] - 0.03
    assert 0.9 < metrics["mask_iou_mean"] < 1
