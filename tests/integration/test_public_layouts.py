"""Scenes in public layouts, evaluated through the readers: the figures of the direct way."""

from __future__ import annotations

import pytest

from coprs_deploy.data.public_layouts import LAYOUTS
from tests.integration.test_command_line import run_json

SCENES = ("--held-out", "--first-seed", "500", "--num-examples", "12")


def metrics(source, *arguments) -> dict[str, float]:
    """Evaluate the demo model; return the metrics of all examples together."""
    found = run_json("evaluate", "--examples", source, *arguments)["metrics"]
    return {name: value for name, value in found.items() if "." not in name}


@pytest.mark.slow
def test_scenes_in_each_layout_are_evaluated_like_an_example_file(tmp_path):
    file = tmp_path / "scenes.jsonl"
    run_json("synth", *SCENES, "--out", file)
    direct = metrics(file)
    assert 0.5 < direct["giou"] <= 1
    assert direct["no_match_recall"] == 1
    for layout in LAYOUTS:
        root = tmp_path / layout
        source = run_json("synth", *SCENES, "--layout", layout, "--out", root)["source"]
        assert metrics(source, "--root", root) == direct, layout
