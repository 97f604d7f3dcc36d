"""What PyTorch once computed on the shipped model: still so, and on every runtime."""

import numpy as np
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.engines import ONNX_RUNTIMES, RunnerOptions, open_bundle_graph
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export.equivalence import compare_graphs, reference_opener
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.export.golden import main, read_golden
from coprs_deploy.specs import GRAPH_NAMES, MASK_DECODER
from tests import ROOT

FILE = ROOT / "tests" / "golden" / "shipped.npz"


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(demo.BUNDLE)


@pytest.fixture(scope="module")
def golden(bundle):
    manifest = bundle.manifest
    return read_golden(FILE, manifest.geometry, manifest.checkpoint_fingerprint)


def compare(golden, candidate):
    def never(name):
        raise AssertionError(f"the outputs of {name} are recorded")

    return compare_graphs(
        reference=never,
        candidate=candidate,
        samples=golden.samples,
        tolerances=TOLERANCES["onnxruntime", "fp32"],
        known=dict(golden.outputs),
    )


def test_the_file_is_small_and_its_masks_are_telling(golden):
    assert FILE.stat().st_size < 600_000
    assert len(golden.samples) == 2
    for mask in golden.outputs[MASK_DECODER]:
        assert 0.001 < np.mean(mask > 0) < 0.9


@pytest.mark.parametrize("runtime", ["torch", *ONNX_RUNTIMES])
def test_every_runtime_computes_what_was_recorded(golden, bundle, runtime):
    specs = {name: graph.spec for name, graph in bundle.manifest.graphs.items()}
    if runtime == "torch":
        candidate = reference_opener(read_checkpoint(demo.CHECKPOINT), specs)
    else:

        def candidate(name):
            return open_bundle_graph(bundle, name, RunnerOptions(), runtime)

    records = compare(golden, candidate)
    assert [record.graph for record in records] == [*GRAPH_NAMES, "end_to_end"]
    assert all(record.passed for record in records), records


@pytest.mark.parametrize("change", ["one cell", "all a little"])
def test_a_change_of_one_cell_and_a_small_shift_are_both_seen(golden, bundle, change):
    outputs = {name: [array.copy() for array in golden.outputs[name]] for name in GRAPH_NAMES}
    scale = np.abs(outputs[MASK_DECODER][0]).max()
    if change == "one cell":
        outputs[MASK_DECODER][0][0, 0, 5, 5] += 1e-3 * scale
    else:
        outputs[MASK_DECODER][0] += 5e-5 * scale  # below the limit of the largest difference
    changed = type(golden)(golden.fingerprint, golden.samples, outputs)
    records = compare(changed, lambda name: open_bundle_graph(bundle, name, RunnerOptions()))
    assert next(record.graph for record in records if not record.passed) == MASK_DECODER


def test_recording_again_gives_the_same_inputs_and_outputs(golden, bundle, tmp_path):
    assert main([str(tmp_path / "again.npz")]) == 0
    manifest = bundle.manifest
    again = read_golden(tmp_path / "again.npz", manifest.geometry, manifest.checkpoint_fingerprint)
    for first, second in zip(golden.samples, again.samples, strict=True):
        assert np.array_equal(first.prepared.image, second.prepared.image)
        assert np.array_equal(first.concentration, second.concentration)
    limit = TOLERANCES["onnxruntime", "fp32"]
    for name in GRAPH_NAMES:
        for first, second in zip(golden.outputs[name], again.outputs[name], strict=True):
            assert np.abs(first - second).max() <= limit[name].relative_error * np.abs(first).max()


def test_a_file_of_another_checkpoint_is_refused_with_the_command(bundle):
    with pytest.raises(EquivalenceError, match=r"record it again: python -m coprs_deploy"):
        read_golden(FILE, bundle.manifest.geometry, "0" * 64)
