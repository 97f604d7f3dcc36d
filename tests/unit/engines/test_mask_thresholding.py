"""Masks at the original image size, thresholded on the host or on the GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coprs_deploy.engines import graphs
from coprs_deploy.engines.cuda import CudaTensor
from coprs_deploy.engines.graphs import masks_at_original_size, threshold_at_original_size
from coprs_deploy.engines.runner import HostTensor
from coprs_deploy.images import ResizeTransform, unpadded_size
from coprs_deploy.logits import resize_logits
from coprs_deploy.specs import Geometry

TINY = Geometry(image_size=128, patch_size=8, out_chans=64)
SAM = Geometry()


def image_of(height, width, geometry):
    inside = unpadded_size(height, width, geometry.image_size)
    return ResizeTransform(np.array(inside), (height, width))


def logits_of(count, geometry, seed=0):
    generator = np.random.default_rng(seed)
    side = geometry.mask_size
    coarse = generator.standard_normal((count, 1, side // 8, side // 8))
    return np.kron(coarse, np.ones((8, 8))).astype(np.float32)


@pytest.mark.parametrize(
    ("height", "width", "geometry"),
    [(128, 128, TINY), (17, 31, TINY), (300, 200, TINY), (1, 700, TINY), (480, 640, SAM)],
)
def test_threshold_at_original_size_equals_the_host(height, width, geometry):
    logits, size = logits_of(3, geometry), image_of(height, width, geometry)
    found = threshold_at_original_size(torch.from_numpy(logits), size, geometry).numpy()
    expected = resize_logits(logits, size, geometry)
    assert found.dtype == np.bool_ and found.shape == (3, height, width)
    # They may differ only where the logit is 0 up to rounding.
    differs = found != (expected > 0)
    assert np.abs(expected[differs]).max(initial=0) < 1e-4
    assert differs.mean() < 1e-3


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 99))
def test_threshold_at_original_size_of_any_size_equals_the_host(height, width, seed):
    logits, size = logits_of(1, TINY, seed), image_of(height, width, TINY)
    found = threshold_at_original_size(torch.from_numpy(logits), size, TINY).numpy()
    expected = resize_logits(logits, size, TINY)
    assert np.abs(expected[found != (expected > 0)]).max(initial=0) < 1e-4


def test_threshold_of_half_precision_logits_computes_in_float32():
    logits = torch.from_numpy(logits_of(1, TINY)).to(torch.float16)
    size = image_of(50, 60, TINY)
    found = threshold_at_original_size(logits, size, TINY)
    assert torch.equal(found, threshold_at_original_size(logits.float(), size, TINY))


@pytest.fixture
def fake_streams(monkeypatch):
    """Streams and events that do nothing, for tensors on the CPU."""
    waited = []
    stream = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    graphs._mask_stream.cache_clear()
    yield waited
    graphs._mask_stream.cache_clear()


def test_masks_of_gpu_chunks_wait_for_each_chunk(fake_streams):
    logits, size = logits_of(6, TINY), image_of(40, 60, TINY)
    chunks = [CudaTensor(torch.from_numpy(p), n) for n, p in enumerate((logits[:4], logits[4:]))]
    masks = masks_at_original_size(chunks, 5, size, TINY)
    expected = threshold_at_original_size(torch.from_numpy(logits[:5]), size, TINY)
    assert np.array_equal(masks, expected.numpy())
    assert fake_streams == [0, 1]


def test_masks_on_a_full_gpu_are_computed_on_the_host(fake_streams, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "threshold_at_original_size", full)
    monkeypatch.setattr(CudaTensor, "numpy", lambda self: self.tensor.numpy())
    logits, size = logits_of(2, TINY), image_of(40, 60, TINY)
    masks = masks_at_original_size([CudaTensor(torch.from_numpy(logits), 0)], 2, size, TINY)
    assert np.array_equal(masks, resize_logits(logits, size, TINY) > 0)


def test_masks_omit_repeated_targets():
    logits, size = logits_of(6, TINY), image_of(40, 60, TINY)
    chunks = [HostTensor(logits[:4]), HostTensor(logits[4:])]
    masks = masks_at_original_size(chunks, 5, size, TINY)
    assert np.array_equal(masks, resize_logits(logits[:5], size, TINY) > 0)
