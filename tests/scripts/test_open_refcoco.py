"""The measurement of opening RefCOCO, on a small share of its size."""

import json

from tests.scripts import load_script


def test_small_share_is_generated_opened_and_measured(capsys):
    script = load_script("benchmarks/open_refcoco.py")
    assert script.main(["--share", "0.002", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sentences"] == int(0.002 * script.TRAINING_SENTENCES)
    assert result["open_s"] < 60 and result["mask_ms"] > 0
