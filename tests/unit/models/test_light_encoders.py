"""Light image encoders: equality with the public ones, normalizations folded, valid regions."""

import numpy as np
import pytest
import torch

from coprs_deploy.models.image_encoder import build_image_encoder
from coprs_deploy.models.layers import BatchNorm2d, fold_batch_norms
from coprs_deploy.specs import ValidRegion
from tests.unit.light_encoders import SAM
from tests.unit.models.record_light_encoders import (
    CASES,
    GOLDEN_FILE,
    draw_image,
    draw_weights,
    subsample,
)

TOLERANCE = 1e-4
"""Largest difference over the largest value: float32 sums in another order; measured below 4e-6."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def built(config, seed=0):
    encoder = build_image_encoder(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    encoder.load_state_dict(draw_weights(shapes, seed), strict=True)
    return encoder.eval()


@pytest.fixture(params=SAM)
def tiny(request):
    """A tiny encoder of each family, and an image with padding."""
    config = SAM[request.param]
    return built(config), draw_image(config.geometry.image_size)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert float(abs(found - expected).max()) <= TOLERANCE * float(abs(expected).max())


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name != "efficientvit_xl" else [])
        for name in CASES
    ],
)
def test_light_encoder_equals_recorded_public_one(name):
    config = CASES[name]
    encoder = built(config)
    with np.load(GOLDEN_FILE) as golden:
        assert sorted(encoder.state_dict()) == golden[f"{name}.names"].tolist()
        embedding = encoder(draw_image(config.geometry.image_size))
        assert embedding.shape == (1, 256, 64, 64)
        assert_close(subsample(embedding), golden[name])


def test_fold_batch_norms_changes_no_embedding(tiny):
    encoder, image = tiny
    expected = encoder(image)
    fold_batch_norms(encoder)
    assert not any(isinstance(module, BatchNorm2d) for module in encoder.modules())
    assert_close(encoder(image), expected)


def test_encoder_batch_equals_single_images(tiny):
    encoder, image = tiny
    other = torch.flip(image, dims=[3])
    both = encoder(torch.cat([image, other]))
    assert_close(both[:1], encoder(image))
    assert_close(both[1:], encoder(other))


@pytest.mark.parametrize("aspect_ratio", [(16, 9), (9, 16)])
def test_valid_region_is_that_of_the_image_alone_with_blank_padding(tiny, aspect_ratio):
    encoder, image = tiny
    region = encoder.config.valid_region(aspect_ratio, drops_padding=True)
    patch = encoder.config.geometry.patch_size
    rows, columns = region.height // patch, region.width // patch
    alone = encoder(image[:, :, : region.height, : region.width])
    blank = encoder(torch.zeros_like(image))
    encoder.set_valid_region(region)
    embedding = encoder(image)
    assert_close(embedding[:, :, :rows, :columns], alone)
    blank[:, :, :rows, :columns] = embedding[:, :, :rows, :columns]
    assert_close(embedding, blank)
    encoder.set_valid_region(None)
    assert encoder(image).shape == embedding.shape
    assert not torch.equal(encoder(image), embedding)


def test_valid_region_that_keeps_padding_is_refused(tiny):
    with pytest.raises(ValueError, match="mixes image and padding"):
        tiny[0].config.valid_region((16, 9))
    exact = ValidRegion((16, 9), 80, 128)
    with pytest.raises(AssertionError, match="skips padding exactly"):
        tiny[0].set_valid_region(exact)
