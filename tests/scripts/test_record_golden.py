"""Recording golden outputs again gives the committed file's inputs and outputs."""

import numpy as np

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.specs import GRAPH_NAMES
from tests.golden import GOLDEN_FILE, read_golden
from tests.scripts import load_script

SCRIPT = load_script("export/record_golden.py")


def test_record_golden_demo_model_equals_committed_file(tmp_path):
    assert SCRIPT.main([str(tmp_path / "again.npz")]) == 0
    manifest = open_bundle(demo.BUNDLE).manifest
    golden, again = (
        read_golden(path, manifest.geometry, manifest.checkpoint_fingerprint)
        for path in (GOLDEN_FILE, tmp_path / "again.npz")
    )
    for first, second in zip(golden.samples, again.samples, strict=True):
        assert np.array_equal(first.prepared.image, second.prepared.image)
        assert np.array_equal(first.concentration, second.concentration)
    limit = TOLERANCES["onnxruntime", "fp32"]
    for name in GRAPH_NAMES:
        for first, second in zip(golden.outputs[name], again.outputs[name], strict=True):
            assert np.abs(first - second).max() <= limit[name].relative_error * np.abs(first).max()


def test_record_golden_missing_checkpoint_returns_2(tmp_path, capsys):
    arguments = [str(tmp_path / "out.npz"), "--checkpoint", str(tmp_path / "none")]
    assert SCRIPT.main(arguments) == 2
    assert "there is no checkpoint directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
