"""Image encoder with an images profile: export, check, and equality with single images."""

import numpy as np
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.engines import RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.engines.onnxruntime_runner import OrtRunner
from coprs_deploy.engines.torch_runner import TorchRunner
from coprs_deploy.errors import EquivalenceError
from coprs_deploy.export import ExportOptions, export_checkpoint
from coprs_deploy.export.comparison import compare_backends
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.export.tolerances import END_TO_END, TOLERANCES
from coprs_deploy.images import prepare_image
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

IMAGES = OptimizationProfile(1, 2, 4)
ROUNDING = TOLERANCES["onnxruntime", "fp32"][IMAGE_ENCODER].relative_error
"""Largest relative error of a batched embedding against the single one."""

MASK_ROUNDING = TOLERANCES["onnxruntime", "fp32"][END_TO_END].relative_error
"""Largest relative error of the masks."""


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "bundle"
    export_checkpoint(tiny_checkpoint, out, ExportOptions(images=IMAGES))
    return open_bundle(out)


@pytest.fixture(params=["onnxruntime", "openvino", "torch"])
def graphs(request, bundle, tiny_checkpoint):
    """The graphs of the bundle in each runtime, and PyTorch's modules."""
    graphs = bundle.manifest.graphs
    if request.param == "torch":
        modules = load_segmentation_model(read_checkpoint(tiny_checkpoint)).graph_modules()
        runners = {name: TorchRunner(modules[name], graph.spec) for name, graph in graphs.items()}
    else:
        runners = {
            name: open_bundle_graph(bundle, name, RunnerOptions(num_threads=1), request.param)
            for name in graphs
        }
    with SegmentationGraphs(runners) as opened:
        yield opened


@pytest.fixture(scope="module")
def images(bundle):
    generator = np.random.default_rng(3)
    shapes = [(40, 60), (64, 48), (30, 30), (90, 20), (50, 64)]
    drawn = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [prepare_image(image, bundle.manifest.geometry) for image in drawn]


def test_export_images_profile_applies_to_encoder_only(bundle):
    graphs = bundle.manifest.graphs
    assert graphs[IMAGE_ENCODER].spec.images == IMAGES
    assert graphs[IMAGE_ENCODER].spec.inputs[0].shape[0] == "images"
    assert graphs[IMAGE_ENCODER].spec.outputs[0].shape[0] == "images"
    for name in (PRIOR, MASK_DECODER):
        assert graphs[name].spec.images.is_static
        assert graphs[name].spec.inputs[0].shape[0] == 1


def test_encode_batch_equals_encode_alone(graphs, images, monkeypatch):
    alone = [graphs.encode(image).numpy() for image in images]
    encoder = graphs.runners[IMAGE_ENCODER]
    sizes = []
    run = encoder._run
    monkeypatch.setattr(
        encoder, "_run", lambda inputs: sizes.append(len(inputs["image"])) or run(inputs)
    )
    together = graphs.encode_batch(images)
    assert sizes == [4, 1]
    assert [e.shape for e in together] == [alone[0].shape] * len(images)
    for found, expected in zip(together, alone, strict=True):
        assert found.dtype == "float32"
        assert np.abs(found.numpy() - expected).max() <= ROUNDING * np.abs(expected).max()
        assert np.array_equal(found.rows()[0].numpy(), found.numpy())
    assert np.abs(alone[0] - alone[1]).max() > 100 * ROUNDING * np.abs(alone[0]).max()


def test_encode_batch_embedding_decodes_in_place(graphs, images):
    concentration = np.ones((1, graphs.runners[PRIOR].spec.inputs[1].shape[1]), np.float32)
    for image, embedding in zip(images, graphs.encode_batch(images), strict=True):
        inputs = (concentration, image.unpadded_size)
        (mask,) = graphs.priors_and_masks(embedding, *inputs)[1]
        (expected,) = graphs.priors_and_masks(graphs.encode(image), *inputs)[1]
        difference = np.abs(mask.numpy() - expected.numpy()).max()
        assert difference <= MASK_ROUNDING * np.abs(expected.numpy()).max()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_export_check_covers_every_batch_size(size, tiny_checkpoint, tmp_path, monkeypatch):
    """An error in one batch size only is found, and nothing is written."""
    run = OrtRunner._run

    def wrong_in_one_size(runner, inputs):
        if "image" in inputs and len(inputs["image"]) == size:
            inputs = {"image": np.concatenate([inputs["image"][:-1], 0 * inputs["image"][-1:]])}
        return run(runner, inputs)

    monkeypatch.setattr(OrtRunner, "_run", wrong_in_one_size)
    with pytest.raises(EquivalenceError, match="image_encoder"):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", ExportOptions(images=IMAGES))
    assert not (tmp_path / "bundle").exists()


def test_compare_backends_images_profile_passes(bundle, tiny_checkpoint):
    samples = sample_inputs(bundle.manifest.geometry, bundle.manifest.policy.hidden_size)
    comparisons = compare_backends(bundle, read_checkpoint(tiny_checkpoint), samples)
    assert len(comparisons) == 4
    assert all(result.passed for result in comparisons)


def test_export_options_images_min_above_one_is_refused():
    with pytest.raises(ValueError, match="images starts at 2; accepted: 1, or 1,opt,max"):
        ExportOptions(images=OptimizationProfile(2, 2, 4))
