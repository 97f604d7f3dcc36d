"""What only a GPU can show: engines and CUDA sessions compute what PyTorch computes."""

import numpy as np
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import (
    RunnerOptions,
    SegmentationGraphs,
    open_bundle_graph,
    runtime_module,
)
from coprs_deploy.engines.autotune import trial_inputs
from coprs_deploy.engines.cuda import current_gpu
from coprs_deploy.engines.graphs import join_chunks, masks_at_original_size
from coprs_deploy.export import ExportOptions, export_checkpoint, verify_bundle
from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.runtime import CoPRS, RuntimeOptions
from coprs_deploy.specs import GRAPH_NAMES, PRIOR, OptimizationProfile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(current_gpu() is None, reason="PyTorch sees no NVIDIA GPU here"),
]

ORT_RELATIVE = 1e-4
"""Float32 on CUDA without TF32, in another order than on the CPU."""


def require(runtime, device="cuda"):
    """Skip what cannot run here, with its reason."""
    for found in runtime_module(runtime).availability():
        if found.name in (runtime, f"{runtime} {device}") and not found.is_available:
            pytest.skip(f"{found.name}: {found.detail}")


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engines(request, tiny_checkpoint, tmp_path_factory):
    """A bundle of engines for this GPU, which the export has compared with PyTorch on it."""
    require(request.param)
    gpu = current_gpu().compute_capability
    options = ExportOptions(
        runtime=request.param,
        targets=OptimizationProfile(1, 2, 4),
        images=OptimizationProfile(1, 2, 4),
        gpus=(gpu,) if request.param == "tensorrt-rtx" else (),
        cache=tmp_path_factory.mktemp("cache"),
    )
    out = tmp_path_factory.mktemp("engines") / "bundle"
    return export_checkpoint(tiny_checkpoint, out, options).bundle


@pytest.mark.tensorrt
def test_the_export_has_verified_them(engines, tiny_checkpoint):
    gpu = current_gpu()
    for graph in engines.manifest.graphs.values():
        assert graph.engine.verified_on == gpu.name
        assert graph.engine.layers and graph.engine.device_memory_bytes is not None
    records = verify_bundle(engines.path, tiny_checkpoint, "cuda")
    assert all(record.passed for record in records)
    assert open_bundle(engines.path).manifest.graphs[PRIOR].engine.verified_on == gpu.name


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_recorded_work_gives_the_same_bits(engines, name):
    found = []
    for recorded in (True, False):
        options = RunnerOptions(device="cuda", cuda_graphs=recorded)
        with open_bundle_graph(engines, name, options) as runner:
            inputs = trial_inputs(runner.spec)
            # The first call runs and records, the second replays.
            outputs = [next(iter(runner(**inputs).values())).numpy() for _ in range(3)]
        assert all(np.array_equal(outputs[0], output) for output in outputs)
        found.append(outputs[0])
    assert np.array_equal(*found)


@pytest.mark.tensorrt
@pytest.mark.parametrize("recorded", [True, False])
def test_prior_and_mask_decoder_as_one_call_give_the_same_bits(engines, recorded):
    options = RunnerOptions(device="cuda", cuda_graphs=recorded)
    with SegmentationGraphs(
        {name: open_bundle_graph(engines, name, options) for name in GRAPH_NAMES}
    ) as stages:
        assert stages.joins_targets
        prepared = prepare_image(np.full((90, 140, 3), 99, np.uint8), engines.manifest.geometry)
        embedding = stages.encode(prepared)
        width = engines.manifest.policy.hidden_size
        concentrations = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
        priors = stages.priors(embedding, concentrations)
        apart = (priors, stages.masks(embedding, priors, prepared.unpadded_size))
        for _ in range(3):  # the first call runs and records, the others replay
            together = stages.priors_and_masks(embedding, concentrations, prepared.unpadded_size)
            for found, expected in zip(together, apart, strict=True):
                assert np.array_equal(join_chunks(found, 3), join_chunks(expected, 3))
        geometry = engines.manifest.geometry
        masks = masks_at_original_size(together[1], 3, prepared, geometry)
        logits = resize_logits(join_chunks(together[1], 3), prepared, geometry)
        assert np.abs(logits[masks != (logits > 0)]).max(initial=0) < 1e-4


def assert_images_together_equal_each_alone(bundle, device):
    """Encode five pictures in two calls, and decode each embedding where the batch left it."""
    graphs, geometry = bundle.manifest.graphs, bundle.manifest.geometry
    options = RunnerOptions(device=device)
    with SegmentationGraphs(
        {name: open_bundle_graph(bundle, name, options) for name in graphs}
    ) as stages:
        generator = np.random.default_rng(1)
        drawn = [generator.integers(0, 256, (50, 30 + n, 3), dtype=np.uint8) for n in range(5)]
        pictures = [prepare_image(picture, geometry) for picture in drawn]
        concentrations = np.ones((1, bundle.manifest.policy.hidden_size), np.float32)
        for picture, embedding in zip(pictures, stages.encode_together(pictures), strict=True):
            alone = stages.encode(picture)
            scale = np.abs(alone.numpy()).max()
            assert np.abs(embedding.numpy() - alone.numpy()).max() <= ORT_RELATIVE * scale
            inputs = (concentrations, picture.unpadded_size)
            (mask,) = stages.priors_and_masks(embedding, *inputs)[1]
            (expected,) = stages.priors_and_masks(alone, *inputs)[1]
            scale = np.abs(expected.numpy()).max()
            assert np.abs(mask.numpy() - expected.numpy()).max() <= 10 * ORT_RELATIVE * scale


@pytest.mark.tensorrt
def test_engines_encode_images_together(engines):
    assert_images_together_equal_each_alone(engines, "cuda")


def test_onnx_runtime_encodes_images_together_on_cuda(tiny_checkpoint, tmp_path):
    require("onnxruntime")
    options = ExportOptions(images=OptimizationProfile(1, 2, 4))
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert_images_together_equal_each_alone(bundle, "cuda")


@pytest.mark.tensorrt
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("drop_padding", [False, True])
def test_engines_for_one_aspect_are_verified_like_others(
    tiny_checkpoint, tmp_path, runtime, drop_padding
):
    require(runtime)
    gpu = current_gpu()
    options = ExportOptions(
        runtime=runtime,
        aspect_ratio=(16, 9),
        drop_padding=drop_padding,
        gpus=(gpu.compute_capability,) if runtime == "tensorrt-rtx" else (),
        cache=tmp_path / "cache",
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert all(g.engine.verified_on == gpu.name for g in bundle.manifest.graphs.values())


@pytest.mark.tensorrt
def test_answers_are_those_of_the_cpu(engines, tiny_bundle, scene):
    with CoPRS.load(tiny_bundle) as coprs:
        expected = coprs.segment(scene, "the red disc", max_targets=2)
    with CoPRS.load(engines.path, RuntimeOptions(device="cuda")) as coprs:
        for _ in range(2):
            found = coprs.segment(scene, "the red disc", max_targets=2)
            assert found.reasoning == expected.reasoning
            assert (found.masks == expected.masks).mean() > 0.999


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_onnx_runtime_computes_the_same_on_cuda(name, tiny_bundle):
    require("onnxruntime")
    bundle = open_bundle(tiny_bundle)
    found = []
    for device in ("cpu", "cuda"):
        with open_bundle_graph(bundle, name, RunnerOptions(device=device)) as runner:
            (output,) = runner(**trial_inputs(runner.spec)).values()
            found.append(output.numpy())
    assert np.abs(found[0] - found[1]).max() <= ORT_RELATIVE * np.abs(found[0]).max()
