"""Segmentation model: padding, graphs, and the size of the real models."""

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from coprs_deploy.conversion.converters import random_tensors
from coprs_deploy.conversion.random_policy import POLICY_SIZES, build_config, build_tokenizer
from coprs_deploy.model_config import SAM_SIZES, SamConfig, SegmentationConfig
from coprs_deploy.models import SegmentationModel
from coprs_deploy.models.segmentation import mask_padding
from coprs_deploy.specs import Geometry, graph_specs

TINY = SegmentationConfig(
    policy_hidden_size=16, sam=msgspec.structs.replace(SAM_SIZES["tiny"], mask_in_chans=16)
)
"""Tiny sizes with SAM's own mask prompt channels."""


@pytest.fixture(scope="module")
def model():
    model = SegmentationModel(TINY)
    model.load_state_dict(random_tensors(TINY, seed=0))
    return model.requires_grad_(False).eval()


def model_inputs(targets=1):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 128, 128, generator=generator)
    return image, torch.randn(targets, 16, generator=generator), torch.tensor([82, 128])


@st.composite
def padded_sizes(draw):
    patch = 4 * draw(st.integers(1, 6))
    geometry = Geometry(image_size=patch * draw(st.integers(1, 6)), patch_size=patch)
    sizes = st.integers(1, geometry.image_size)
    return geometry, draw(sizes), draw(sizes)


@given(padded_sizes())
def test_mask_padding_keeps_cells_with_a_pixel(case):
    geometry, height, width = case
    side = geometry.mask_size
    logits = torch.arange(2.0 * side * side).reshape(2, 1, side, side) + 1
    masked = mask_padding(logits, torch.tensor([height, width]), geometry)
    rows = math.ceil(height / geometry.mask_stride)
    columns = math.ceil(width / geometry.mask_stride)
    expected = torch.full_like(logits, -50.0)
    expected[:, :, :rows, :columns] = logits[:, :, :rows, :columns]
    assert torch.equal(masked, expected)


def test_mask_padding_equals_public_code():
    logits = torch.zeros(1, 1, 256, 256)
    masked = mask_padding(logits, torch.tensor([577, 1024]), Geometry())
    assert (masked == 0).sum() == 145 * 256  # ceil(577 / 4) rows of the unpadded region
    assert masked[0, 0, 145, 0] == -50


def test_graph_modules_in_a_row_equal_model(model):
    image, concentration, unpadded_size = model_inputs(targets=2)
    prior_logits, mask_logits = model(image, concentration, unpadded_size)
    graphs = model.graph_modules()
    embedding = graphs["image_encoder"](image)
    prior = graphs["prior"](embedding, concentration)
    assert torch.equal(prior, prior_logits)
    assert torch.equal(graphs["mask_decoder"](embedding, prior, unpadded_size), mask_logits)


def test_graph_modules_match_specs(model):
    specs = graph_specs(TINY.geometry, TINY.policy_hidden_size)
    graphs = model.graph_modules()
    assert list(graphs) == list(specs)
    for name, spec in specs.items():
        inputs = [torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in spec.inputs]
        output = graphs[name](*inputs)
        dtype = str(output.dtype).removeprefix("torch.")
        assert spec.outputs[0].accepts(dtype, tuple(output.shape)), name


def test_graph_modules_share_model_parameters(model):
    whole = {id(parameter) for parameter in model.parameters()}
    parts = {id(p) for module in model.graph_modules().values() for p in module.parameters()}
    assert parts == whole


def test_model_many_concentrations_equal_single_calls(model):
    image, concentrations, unpadded_size = model_inputs(targets=3)
    together = model(image, concentrations, unpadded_size)
    for n in range(3):
        alone = model(image, concentrations[n : n + 1], unpadded_size)
        for all_maps, one_map in zip(together, alone, strict=True):
            error = (all_maps[n : n + 1] - one_map).abs().max() / one_map.abs().max()
            assert error < 1e-5  # batched float32 products may sum in another order
    for maps in together:
        assert (maps[0] - maps[1]).abs().max() / maps.abs().max() > 1e-3


@pytest.mark.parametrize("size", ["tiny", "wide"])
def test_model_mask_depends_on_concentration_and_padding(size):
    config = {
        "tiny": SegmentationConfig(policy_hidden_size=16, sam=SAM_SIZES["tiny"]),
        "wide": TINY,
    }[size]
    model = SegmentationModel(config)
    model.load_state_dict(random_tensors(config, seed=0))
    image, concentrations, unpadded_size = model_inputs(targets=2)
    with torch.inference_mode():
        _, masks = model(image, concentrations, unpadded_size)
        _, unmasked = model(image, concentrations, torch.tensor([128, 128]))
    assert (masks[0] - masks[1]).abs().max() / masks.abs().max() > 1e-3
    assert (unmasked - masks).abs().max() / masks.abs().max() > 1e-3


def test_model_prior_in_padding_does_not_reach_mask(model):
    decode = model.graph_modules()["mask_decoder"]
    embedding = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(3))
    prior = torch.zeros(1, 1, 64, 64)
    before = decode(embedding, prior, torch.tensor([82, 128]))
    prior[:, :, 41:] = 30.0
    assert torch.equal(decode(embedding, prior, torch.tensor([82, 128])), before)
    prior[:, :, 40] = 30.0
    assert not torch.equal(decode(embedding, prior, torch.tensor([82, 128])), before)


@pytest.mark.parametrize(
    ("sam_size", "billions"), [("vit_h", 8.93), ("vit_l", 8.60), ("vit_b", 8.38)]
)
def test_model_7b_parameter_count_equals_paper(sam_size, billions, seven_b):
    config = SegmentationConfig(policy_hidden_size=3584, sam=SAM_SIZES[sam_size])
    with torch.device("meta"):
        segmentation = SegmentationModel(config)
    total = seven_b + sum(p.numel() for p in segmentation.parameters())
    assert total / 1e9 == pytest.approx(billions, rel=5e-3)  # table 4 gives three digits


@pytest.fixture(scope="module")
def seven_b():
    """Parameters of the 7B policy."""
    size = POLICY_SIZES["7b"]
    config = build_config(size, build_tokenizer(size.family))
    with torch.device("meta"):
        policy = AutoModelForImageTextToText.from_config(config)
    return sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_num_heads": 7}, "encoder_embed_dim is 768; it must be a multiple of 7"),
        ({"decoder_num_heads": 3}, "geometry.out_chans is 256; it must be a multiple of 6"),
        ({"mask_in_chans": 6}, "mask_in_chans is 6; it must be a multiple of 4"),
        (
            {"encoder_global_attn_indexes": (2, 12)},
            "names block 12; accepted: 0 to 11",
        ),
    ],
)
def test_segmentation_config_inconsistent_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamConfig(**changes)
