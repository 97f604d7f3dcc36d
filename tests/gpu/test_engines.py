"""Engines and CUDA sessions on a real GPU: their outputs equal those of PyTorch on the CPU."""

import numpy as np
import pytest

from coprs_deploy.bundle import open_bundle
from coprs_deploy.engines import (
    RunnerOptions,
    SegmentationGraphs,
    open_bundle_graph,
    runtime_module,
)
from coprs_deploy.engines.autotune import random_inputs
from coprs_deploy.engines.cuda import current_gpu, gpu_memory
from coprs_deploy.engines.graphs import join_chunks, masks_at_original_size
from coprs_deploy.export import ExportOptions, export_checkpoint, verify_bundle
from coprs_deploy.images import prepare_image
from coprs_deploy.logits import resize_logits
from coprs_deploy.runtime import CoPRS, RuntimeOptions
from coprs_deploy.specs import GRAPH_NAMES, PRIOR, OptimizationProfile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(current_gpu() is None, reason="PyTorch sees no NVIDIA GPU here"),
]

RELATIVE_ERROR = 1e-4
"""float32 on CUDA without TF32, summed in another order than on the CPU."""


def require(runtime, device="cuda"):
    """Skip a test whose runtime cannot run on this machine."""
    for found in runtime_module(runtime).availability():
        if found.name in (runtime, f"{runtime} {device}") and not found.is_available:
            pytest.skip(f"{found.name}: {found.detail}")


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engines(request, tiny_checkpoint, tmp_path_factory):
    """A bundle of engines for this GPU, which export verified on it."""
    require(request.param)
    gpu = current_gpu().compute_capability
    options = ExportOptions(
        runtime=request.param,
        targets=OptimizationProfile(1, 2, 4),
        images=OptimizationProfile(1, 2, 4),
        compute_capabilities=(gpu,) if request.param == "tensorrt-rtx" else (),
        cache_dir=tmp_path_factory.mktemp("cache"),
    )
    out = tmp_path_factory.mktemp("engines") / "bundle"
    return export_checkpoint(tiny_checkpoint, out, options).bundle


def test_memory_of_the_gpu_is_that_of_the_driver():
    torch = pytest.importorskip("torch")
    held = torch.zeros(1 << 24, device="cuda")
    memory = gpu_memory()[0]
    assert 4 * held.numel() <= memory["reserved"] <= memory["used"] <= memory["total"]


@pytest.mark.tensorrt
def test_exported_engines_are_verified_on_this_gpu(engines, tiny_checkpoint):
    gpu = current_gpu()
    for graph in engines.manifest.graphs.values():
        assert graph.engine.verified_on == gpu.name
        assert graph.engine.layers and graph.engine.device_memory_bytes is not None
    records = verify_bundle(engines.path, tiny_checkpoint, "cuda")
    assert all(record.passed for record in records)
    assert open_bundle(engines.path).manifest.graphs[PRIOR].engine.verified_on == gpu.name


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_cuda_graphs_give_the_same_bits(engines, name):
    found = []
    for cuda_graphs in (True, False):
        options = RunnerOptions(device="cuda", cuda_graphs=cuda_graphs)
        with open_bundle_graph(engines, name, options) as runner:
            inputs = random_inputs(runner.spec)
            # The first call runs and captures, the others replay.
            outputs = [next(iter(runner(**inputs).values())).numpy() for _ in range(3)]
        assert all(np.array_equal(outputs[0], output) for output in outputs)
        found.append(outputs[0])
    assert np.array_equal(*found)


@pytest.mark.tensorrt
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_fused_prior_and_mask_decoder_give_the_same_bits(engines, cuda_graphs):
    options = RunnerOptions(device="cuda", cuda_graphs=cuda_graphs)
    with SegmentationGraphs(
        {name: open_bundle_graph(engines, name, options) for name in GRAPH_NAMES}
    ) as graphs:
        assert graphs.is_fused
        prepared = prepare_image(np.full((90, 140, 3), 99, np.uint8), engines.manifest.geometry)
        embedding = graphs.encode(prepared)
        hidden_size = engines.manifest.policy.hidden_size
        concentrations = (
            np.random.default_rng(0).standard_normal((3, hidden_size)).astype(np.float32)
        )
        priors = graphs.priors(embedding, concentrations)
        separate = (priors, graphs.masks(embedding, priors, prepared.unpadded_size))
        for _ in range(3):  # the first call runs and captures, the others replay
            together = graphs.priors_and_masks(embedding, concentrations, prepared.unpadded_size)
            for found, expected in zip(together, separate, strict=True):
                assert np.array_equal(join_chunks(found, 3), join_chunks(expected, 3))
        geometry = engines.manifest.geometry
        masks = masks_at_original_size(together[1], 3, prepared, geometry)
        logits = resize_logits(join_chunks(together[1], 3), prepared, geometry)
        assert np.abs(logits[masks != (logits > 0)]).max(initial=0) < 1e-4


def assert_a_batch_equals_single_images(bundle, device):
    """Encode five images in two calls, and decode each embedding in place."""
    geometry = bundle.manifest.geometry
    options = RunnerOptions(device=device)
    with SegmentationGraphs(
        {name: open_bundle_graph(bundle, name, options) for name in GRAPH_NAMES}
    ) as graphs:
        generator = np.random.default_rng(1)
        arrays = [generator.integers(0, 256, (50, 30 + n, 3), dtype=np.uint8) for n in range(5)]
        images = [prepare_image(array, geometry) for array in arrays]
        concentrations = np.ones((1, bundle.manifest.policy.hidden_size), np.float32)
        for image, embedding in zip(images, graphs.encode_batch(images), strict=True):
            alone = graphs.encode(image)
            scale = np.abs(alone.numpy()).max()
            assert np.abs(embedding.numpy() - alone.numpy()).max() <= RELATIVE_ERROR * scale
            inputs = (concentrations, image.unpadded_size)
            (mask,) = graphs.priors_and_masks(embedding, *inputs)[1]
            (expected,) = graphs.priors_and_masks(alone, *inputs)[1]
            scale = np.abs(expected.numpy()).max()
            assert np.abs(mask.numpy() - expected.numpy()).max() <= 10 * RELATIVE_ERROR * scale


@pytest.mark.tensorrt
def test_engines_encode_batches(engines):
    assert_a_batch_equals_single_images(engines, "cuda")


def test_onnx_runtime_on_cuda_encodes_batches(tiny_checkpoint, tmp_path):
    require("onnxruntime")
    options = ExportOptions(images=OptimizationProfile(1, 2, 4))
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert_a_batch_equals_single_images(bundle, "cuda")


@pytest.mark.tensorrt
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("drop_padding", [False, True])
def test_engines_with_a_fixed_aspect_ratio_are_verified(
    tiny_checkpoint, tmp_path, runtime, drop_padding
):
    require(runtime)
    gpu = current_gpu()
    options = ExportOptions(
        runtime=runtime,
        aspect_ratio=(16, 9),
        drop_padding=drop_padding,
        compute_capabilities=(gpu.compute_capability,) if runtime == "tensorrt-rtx" else (),
        cache_dir=tmp_path / "cache",
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert all(g.engine.verified_on == gpu.name for g in bundle.manifest.graphs.values())


@pytest.mark.tensorrt
def test_segment_on_engines_equals_the_cpu(engines, tiny_bundle, scene):
    with CoPRS.load(tiny_bundle) as coprs:
        expected = coprs.segment(scene, "the red disc", max_targets=2)
    with CoPRS.load(engines.path, RuntimeOptions(device="cuda")) as coprs:
        for _ in range(2):
            found = coprs.segment(scene, "the red disc", max_targets=2)
            assert found.reasoning == expected.reasoning
            assert (found.masks == expected.masks).mean() > 0.999


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_onnx_runtime_on_cuda_equals_the_cpu(name, tiny_bundle):
    require("onnxruntime")
    bundle = open_bundle(tiny_bundle)
    found = []
    for device in ("cpu", "cuda"):
        with open_bundle_graph(bundle, name, RunnerOptions(device=device)) as runner:
            (output,) = runner(**random_inputs(runner.spec)).values()
            found.append(output.numpy())
    assert np.abs(found[0] - found[1]).max() <= RELATIVE_ERROR * np.abs(found[0]).max()
