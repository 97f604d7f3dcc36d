"""The full tier's model in ``examples/``: exported as a user would, and asked in many wordings."""

from __future__ import annotations

import json

import pytest

from coprs_deploy.cli.main import main
from tests import ROOT

CHECKPOINT = ROOT / "examples/full/checkpoint"
REPORT = ROOT / "docs/reports/full-tier-further/report.json"

FIGURES = {"mask_iou": 0.8, "precision_at_50": 0.85, "no_match_recall": 0.75}
"""What 48 scenes must reach: below the committed report by more than their standard error."""


@pytest.mark.slow
def test_its_answers_are_right(tmp_path):
    bundle = tmp_path / "bundle"
    assert main(["export", str(CHECKPOINT), "--out", str(bundle), "--refer-to-policy"]) == 0
    required = [f"--require={name}={value}" for name, value in FIGURES.items()]
    asked = ["--tier", "full", "--count", "48", "--absent", "16"]
    assert main(["evaluate", str(bundle), *asked, *required]) == 0


def test_the_readme_tells_the_figures_of_its_report():
    figures = json.loads(REPORT.read_text(encoding="utf-8"))["generated"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    iou, hits = (f"{figures[name]:.3f}"[1:] for name in ("mask_iou", "precision_at_50"))
    assert f"a mask IoU of {iou} and a P@0.5 of {hits} on held-out scenes" in readme
