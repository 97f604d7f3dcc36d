"""Golden outputs of the demo model: PyTorch and every runtime still compute what was recorded."""

import numpy as np
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import ONNX_RUNTIMES, RunnerOptions, open_bundle_graph
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import reference_opener
from coprs_deploy.specs import GRAPH_NAMES, MASK_DECODER
from tests.golden import GOLDEN_FILE, compare_with_golden, read_golden


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(demo.BUNDLE)


@pytest.fixture(scope="module")
def golden(bundle):
    manifest = bundle.manifest
    return read_golden(GOLDEN_FILE, manifest.geometry, manifest.checkpoint_fingerprint)


def test_golden_file_is_small_and_its_masks_are_not_trivial(golden):
    assert GOLDEN_FILE.stat().st_size < 600_000
    assert len(golden.samples) == 2
    for mask in golden.outputs[MASK_DECODER]:
        assert 0.001 < np.mean(mask > 0) < 0.9


@pytest.mark.parametrize("runtime", ["torch", *ONNX_RUNTIMES])
def test_golden_every_runtime_computes_recorded_outputs(golden, bundle, runtime):
    specs = {name: graph.spec for name, graph in bundle.manifest.graphs.items()}
    if runtime == "torch":
        candidate = reference_opener(read_checkpoint(demo.CHECKPOINT), specs)
    else:

        def candidate(name):
            return open_bundle_graph(bundle, name, RunnerOptions(), runtime)

    records = compare_with_golden(golden, candidate)
    assert [record.graph for record in records] == [*GRAPH_NAMES, "end_to_end"]
    assert all(record.passed for record in records), records


@pytest.mark.parametrize("change", ["one cell", "all a little"])
def test_golden_changed_cell_and_small_shift_fail(golden, bundle, change):
    outputs = {name: [array.copy() for array in golden.outputs[name]] for name in GRAPH_NAMES}
    scale = np.abs(outputs[MASK_DECODER][0]).max()
    if change == "one cell":
        outputs[MASK_DECODER][0][0, 0, 5, 5] += 1e-3 * scale
    else:
        outputs[MASK_DECODER][0] += 5e-5 * scale  # below the limit of the relative error
    changed = type(golden)(golden.fingerprint, golden.samples, outputs)
    records = compare_with_golden(
        changed, lambda name: open_bundle_graph(bundle, name, RunnerOptions())
    )
    assert next(record.graph for record in records if not record.passed) == MASK_DECODER


def test_golden_file_of_other_checkpoint_is_refused(bundle):
    with pytest.raises(EquivalenceError, match=r"record it again: python export/record_golden\.py"):
        read_golden(GOLDEN_FILE, bundle.manifest.geometry, "0" * 64)
