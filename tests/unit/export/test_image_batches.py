"""An encoder that takes several images: exported, checked, and equal to one image at a time."""

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
from coprs_deploy.export.equivalence import END_TO_END, TOLERANCES, sample_inputs
from coprs_deploy.images import prepare_image
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PRIOR, OptimizationProfile

IMAGES = OptimizationProfile(1, 2, 4)
ROUNDING = TOLERANCES["onnxruntime", "fp32"][IMAGE_ENCODER].relative_error
"""Largest difference of an image encoded in company from the same one encoded alone."""

MASK_ROUNDING = TOLERANCES["onnxruntime", "fp32"][END_TO_END].relative_error
"""The same of the masks that follow."""


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "bundle"
    export_checkpoint(tiny_checkpoint, out, ExportOptions(images=IMAGES))
    return open_bundle(out)


@pytest.fixture(params=["onnxruntime", "openvino", "torch"])
def stages(request, bundle, tiny_checkpoint):
    """The graphs of the bundle in each runtime, and PyTorch's modules."""
    graphs = bundle.manifest.graphs
    if request.param == "torch":
        modules = load_segmentation_model(read_checkpoint(tiny_checkpoint)).stages()
        runners = {name: TorchRunner(modules[name], graph.spec) for name, graph in graphs.items()}
    else:
        runners = {
            name: open_bundle_graph(bundle, name, RunnerOptions(num_threads=1), request.param)
            for name in graphs
        }
    with SegmentationGraphs(runners) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(bundle):
    generator = np.random.default_rng(3)
    shapes = [(40, 60), (64, 48), (30, 30), (90, 20), (50, 64)]
    drawn = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [prepare_image(picture, bundle.manifest.geometry) for picture in drawn]


def test_the_encoder_takes_a_range_and_the_others_one_image(bundle):
    graphs = bundle.manifest.graphs
    assert graphs[IMAGE_ENCODER].spec.images == IMAGES
    assert graphs[IMAGE_ENCODER].spec.inputs[0].shape[0] == "images"
    assert graphs[IMAGE_ENCODER].spec.outputs[0].shape[0] == "images"
    for name in (PRIOR, MASK_DECODER):
        assert graphs[name].spec.images.is_static
        assert graphs[name].spec.inputs[0].shape[0] == 1


def test_images_that_go_together_are_encoded_as_they_are_alone(stages, pictures, monkeypatch):
    alone = [stages.encode(picture).numpy() for picture in pictures]
    encoder = stages.runners[IMAGE_ENCODER]
    sizes = []
    run = encoder._run
    monkeypatch.setattr(
        encoder, "_run", lambda inputs: sizes.append(len(inputs["image"])) or run(inputs)
    )
    together = stages.encode_batch(pictures)
    assert sizes == [4, 1]
    assert [e.shape for e in together] == [alone[0].shape] * len(pictures)
    for found, expected in zip(together, alone, strict=True):
        assert found.dtype == "float32"
        assert np.abs(found.numpy() - expected).max() <= ROUNDING * np.abs(expected).max()
        assert np.array_equal(found.rows()[0].numpy(), found.numpy())
    assert np.abs(alone[0] - alone[1]).max() > 100 * ROUNDING * np.abs(alone[0]).max()


def test_an_embedding_of_a_batch_is_read_where_it_lies(stages, pictures):
    concentration = np.ones((1, stages.runners[PRIOR].spec.inputs[1].shape[1]), np.float32)
    for picture, embedding in zip(pictures, stages.encode_batch(pictures), strict=True):
        inputs = (concentration, picture.unpadded_size)
        (mask,) = stages.priors_and_masks(embedding, *inputs)[1]
        (expected,) = stages.priors_and_masks(stages.encode(picture), *inputs)[1]
        difference = np.abs(mask.numpy() - expected.numpy()).max()
        assert difference <= MASK_ROUNDING * np.abs(expected.numpy()).max()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_check_of_an_export_runs_every_size(size, tiny_checkpoint, tmp_path, monkeypatch):
    """A fault that shows in one size only is found, and nothing is written."""
    run = OrtRunner._run

    def wrong_in_one_size(runner, inputs):
        if "image" in inputs and len(inputs["image"]) == size:
            inputs = {"image": np.concatenate([inputs["image"][:-1], 0 * inputs["image"][-1:]])}
        return run(runner, inputs)

    monkeypatch.setattr(OrtRunner, "_run", wrong_in_one_size)
    with pytest.raises(EquivalenceError, match="image_encoder"):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", ExportOptions(images=IMAGES))
    assert not (tmp_path / "bundle").exists()


def test_the_chain_of_equality_is_measured_on_it(bundle, tiny_checkpoint):
    samples = sample_inputs(bundle.manifest.geometry, bundle.manifest.policy.hidden_size)
    links = compare_backends(bundle, read_checkpoint(tiny_checkpoint), samples)
    assert len(links) == 4
    assert all(link.passed for link in links)


def test_an_encoder_that_would_wait_for_company_is_refused():
    with pytest.raises(ValueError, match="images starts at 2; accepted: 1, or 1,opt,max"):
        ExportOptions(images=OptimizationProfile(2, 2, 4))
