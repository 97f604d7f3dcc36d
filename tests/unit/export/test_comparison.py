"""Backend comparison: every backend, failures, and the HTML page."""

import re
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import read_checkpoint
from coprs_deploy.export import ExportOptions, comparison, export_checkpoint
from coprs_deploy.export.comparison import FLOAT32_GRAPH, MODULE, TRACED, compare_backends
from coprs_deploy.export.comparison_page import write_comparison_page
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.specs import GRAPH_NAMES, MASK_DECODER

BACKENDS = [MODULE, TRACED, "fp32 graph on onnxruntime", "fp32 graph on openvino"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def samples(bundle):
    return sample_inputs(bundle.manifest.geometry, bundle.manifest.policy.hidden_size)


@pytest.fixture(scope="module")
def comparisons(bundle, samples, tiny_checkpoint):
    return compare_backends(bundle, read_checkpoint(tiny_checkpoint), samples)


def test_compare_backends_covers_module_to_every_runtime(comparisons):
    module, traced, ort, openvino = BACKENDS
    found = [(result.reference, result.candidate) for result in comparisons]
    assert found == [(module, traced), (traced, ort), (traced, openvino), (ort, openvino)]
    for result in comparisons:
        assert result.passed
        names = [difference.record.graph for difference in result.differences]
        assert names == [*GRAPH_NAMES, "end_to_end"]


@pytest.mark.slow
def test_compare_backends_fp16_bundle_compares_float32_graph_first(
    tiny_checkpoint, samples, tmp_path
):
    options = ExportOptions(precision="fp16")
    typed = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    found = compare_backends(typed, read_checkpoint(tiny_checkpoint), samples)
    float32, ort, openvino = FLOAT32_GRAPH, "fp16 graph on onnxruntime", "fp16 graph on openvino"
    assert [(result.reference, result.candidate) for result in found] == [
        (MODULE, TRACED),
        (TRACED, float32),
        (float32, ort),
        (float32, openvino),
        (ort, openvino),
    ]
    assert all(result.passed for result in found)
    relative_error = [result.differences[0].record.relative_error for result in found]
    assert relative_error[1] < 1e-4 < relative_error[2]


def test_compare_backends_traced_graphs_are_bit_exact(comparisons):
    for difference in comparisons[0].differences[:3]:
        assert difference.record.max_abs_error == 0
        assert not difference.heatmap.any()


def test_difference_heatmap_shows_worst_sample(comparisons):
    sizes = [difference.heatmap.shape for difference in comparisons[1].differences]
    assert sizes == [(16, 16), (64, 64), (64, 64), (64, 64)]
    for difference in comparisons[1].differences[1:]:  # one channel: the mean over it is the value
        assert difference.heatmap.max() == pytest.approx(difference.record.max_abs_error)
        assert difference.heatmap.max() > 0


def test_compare_backends_wrong_runtime_fails_its_comparisons(
    bundle, samples, tiny_checkpoint, monkeypatch, tmp_path
):
    opened = comparison.open_bundle_graph

    def wrong(bundle, name, options, runtime):
        runner = opened(bundle, name, options, runtime)
        if runtime == "openvino" and name == MASK_DECODER:
            run = runner._run

            def shifted(inputs):
                outputs = run(inputs)
                outputs["mask_logits"].tensor[..., 10, 20] += 1
                return outputs

            monkeypatch.setattr(runner, "_run", shifted)
        return runner

    monkeypatch.setattr(comparison, "open_bundle_graph", wrong)
    comparisons = compare_backends(bundle, read_checkpoint(tiny_checkpoint), samples)
    assert [result.passed for result in comparisons] == [True, True, False, False]
    heatmap = comparisons[2].differences[2].heatmap
    assert np.unravel_index(heatmap.argmax(), heatmap.shape) == (10, 20)
    write_comparison_page(tmp_path / "page.html", bundle, comparisons, len(samples))
    page = (tmp_path / "page.html").read_text()
    assert "outside tolerance" in page
    assert (
        page.count('<td class="bad">failed<') == 4
    )  # the graph and end to end, in both comparisons


def test_comparison_page_is_self_contained_and_well_formed(comparisons, bundle, samples, tmp_path):
    write_comparison_page(tmp_path / "deep" / "page.html", bundle, comparisons, len(samples))
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "all within tolerance" in page
    assert page.count("data:image/png;base64,") == 16
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    for backend in BACKENDS:
        assert backend in page
    open_tags = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Check().feed(page)
    assert open_tags == []


def test_compare_backends_engines_are_refused(bundle, samples, tiny_checkpoint):
    graphs = {
        name: msgspec.structs.replace(graph, runtime="tensorrt")
        for name, graph in bundle.manifest.graphs.items()
    }
    engines = type(bundle)(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))
    with pytest.raises(ValueError, match="the bundle contains engines of tensorrt"):
        compare_backends(engines, read_checkpoint(tiny_checkpoint), samples)
