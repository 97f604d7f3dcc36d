"""Correlation of prior and mask from the log of a run."""

import json

import pytest

from coprs_deploy.errors import ArtifactError
from coprs_deploy.evaluation.reports.training_correlation import read_training_correlation

LINES = [
    {"stage": "warm", "step": 1, "loss": 2.0},
    {"stage": "a", "step": 1, "loss/prior_bce": 0.75, "loss/mask_dice": 0.5},
    {"stage": "a", "step": 2, "eval/giou": 0.5},
    {"stage": "b", "step": 1, "loss/prior_bce": 1.5, "loss/mask_dice": 0.25},
]


def test_read_training_correlation_takes_lines_with_both_losses(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"loss/pri')
    for path in (tmp_path, log):
        found = read_training_correlation(path)
        assert (found.x, found.y) == ((0.25, -0.5), (0.5, 0.75))
        assert found.unit == "batches"


def test_read_training_correlation_without_values_or_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_training_correlation(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(LINES[0]))
    with pytest.raises(ArtifactError, match="no line with loss/prior_bce and loss/mask_dice"):
        read_training_correlation(tmp_path)
    log.write_text("no JSON\n" + json.dumps(LINES[1]))
    with pytest.raises(ArtifactError, match="line 1 is not JSON"):
        read_training_correlation(tmp_path)
