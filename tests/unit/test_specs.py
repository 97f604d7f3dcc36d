"""Records, geometry, optimization profiles and the specifications of the graphs."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coprs_deploy.specs import (
    GRAPH_NAMES,
    IMAGE_ENCODER,
    MASK_DECODER,
    OUTSIDE_IMAGE_LOGIT,
    PRIOR,
    Geometry,
    GraphSpec,
    OptimizationProfile,
    TensorSpec,
    graph_specs,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def test_geometry_default_equals_sam():
    geometry = Geometry()
    assert (geometry.image_size, geometry.grid_size, geometry.mask_size) == (1024, 64, 256)
    assert geometry.mask_stride == 4
    assert geometry.out_chans == 256
    assert geometry.pixel_mean == (123.675, 116.28, 103.53)
    assert geometry.pixel_std == (58.395, 57.12, 57.375)
    assert OUTSIDE_IMAGE_LOGIT == -50


@PROPERTY
@given(quarters=st.integers(1, 8), patches=st.integers(1, 64))
def test_geometry_grid_mask_and_stride_tile_the_image(quarters, patches):
    geometry = Geometry(image_size=4 * quarters * patches, patch_size=4 * quarters)
    assert geometry.grid_size == patches
    assert geometry.mask_size == 4 * patches
    assert geometry.mask_stride == quarters
    assert geometry.mask_size * geometry.mask_stride == geometry.image_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 14}, "patch_size is 14; it must be a multiple of 4"),
        ({"patch_size": 0}, "patch_size is 0; it must be a multiple of 4"),
        ({"patch_size": -4}, "patch_size is -4; it must be a multiple of 4"),
        ({"image_size": 1000}, r"image_size is 1000; .*multiple of patch_size \(16\)"),
        ({"image_size": 0}, r"image_size is 0; .*multiple of patch_size \(16\)"),
        ({"image_size": -16}, r"image_size is -16; .*multiple of patch_size \(16\)"),
        ({"pixel_std": (1.0, 0.0, 1.0)}, r"pixel_std is \(1.0, 0.0, 1.0\); .*above 0"),
        ({"pixel_std": (1.0, 1.0, -2.0)}, "above 0"),
    ],
)
def test_geometry_impossible_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**values)


def test_record_is_frozen_and_compares_by_value():
    assert Geometry() == Geometry()
    with pytest.raises(AttributeError):
        Geometry().image_size = 512


def test_record_from_json_returns_equal_record():
    spec = graph_specs(Geometry(image_size=128, patch_size=8), 64, OptimizationProfile(1, 4, 16))[
        PRIOR
    ]
    assert GraphSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_record_to_json_contains_each_field():
    data = TensorSpec("image", "float32", (1, "targets")).to_json()
    assert json.loads(json.dumps(data)) == {
        "name": "image",
        "dtype": "float32",
        "shape": [1, "targets"],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sise": 64}, "image_sise"),
        ({"image_size": "64"}, "image_size"),
        ({"image_size": 64.5}, "image_size"),
        ({"image_size": True}, "image_size"),
        ({"pixel_mean": [1.0, 2.0]}, "pixel_mean"),
        ({"image_size": 1000}, "image_size is 1000"),
    ],
)
def test_record_from_json_wrong_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Geometry.from_json({**Geometry().to_json(), **change})


def test_record_from_json_nested_error_has_its_path():
    data = graph_specs(Geometry(), 64)[PRIOR].to_json()
    data["inputs"][1]["dtype"] = 7
    with pytest.raises(ValueError, match=r"\$\.inputs\[1\]\.dtype|\$\.inputs\[\.\.\.\]\.dtype"):
        GraphSpec.from_json(data)
    del data["inputs"][1]["dtype"]
    with pytest.raises(ValueError, match="missing required field `dtype`"):
        GraphSpec.from_json(data)


@pytest.mark.parametrize("data", [None, [], "geometry", 7])
def test_record_from_json_other_data_is_refused(data):
    with pytest.raises(ValueError, match="Expected `object`"):
        Geometry.from_json(data)


# Targets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", (1, 1, 1)),
        ("16", (16, 16, 16)),
        ("1,4,16", (1, 4, 16)),
        (" 2 , 2 , 3 ", (2, 2, 3)),
    ],
)
def test_profile_parse_valid_text_returns_numbers(text, expected):
    profile = OptimizationProfile.parse(text)
    assert (profile.min, profile.opt, profile.max) == expected
    assert profile.is_static == (expected[0] == expected[2])


@pytest.mark.parametrize("text", ["", ",", "1,2", "1,2,3,4", "a", "-1", "1.5", "1;2;3", "1,,3"])
def test_profile_parse_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r"accepted: N, or min,opt,max") as refusal:
        OptimizationProfile.parse(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("numbers", [(0, 0, 0), (0, 1, 2), (2, 1, 3), (1, 4, 3), (3, 2, 1)])
def test_profile_out_of_order_is_refused(numbers):
    message = r"accepted: 1 <= min <= opt <= max"
    with pytest.raises(ValueError, match=message):
        OptimizationProfile(*numbers)
    with pytest.raises(ValueError, match=message):
        OptimizationProfile.parse(",".join(map(str, numbers)))


# Tensors and graphs


@pytest.mark.parametrize(
    ("dtype", "shape", "is_accepted"),
    [
        ("float32", (3, 64), True),
        ("float32", (1, 64), True),
        ("float16", (3, 64), False),
        ("float32", (3, 63), False),
        ("float32", (64,), False),
        ("float32", (1, 3, 64), False),
        ("float32", (), False),
    ],
)
def test_tensor_spec_accepts_compares_dtype_and_fixed_dimensions(dtype, shape, is_accepted):
    spec = TensorSpec("concentration", "float32", ("targets", 64))
    assert spec.accepts(dtype, shape) is is_accepted


def test_tensor_spec_str_shows_name_dtype_and_shape():
    spec = TensorSpec("concentration", "float32", ("targets", 64))
    assert str(spec) == "concentration: float32 (targets, 64)"


def signature(tensors):
    return [str(tensor) for tensor in tensors]


def test_graph_specs_sam_have_contract_shapes():
    specs = graph_specs(Geometry(), 3584)
    assert tuple(specs) == GRAPH_NAMES == (IMAGE_ENCODER, PRIOR, MASK_DECODER)
    assert all(spec.name == name for name, spec in specs.items())
    assert {name: signature(spec.inputs) for name, spec in specs.items()} == {
        "image_encoder": ["image: float32 (1, 3, 1024, 1024)"],
        "prior": ["image_embedding: float32 (1, 256, 64, 64)", "concentration: float32 (1, 3584)"],
        "mask_decoder": [
            "image_embedding: float32 (1, 256, 64, 64)",
            "prior_logits: float32 (1, 1, 256, 256)",
            "unpadded_size: int64 (2)",
        ],
    }
    assert {name: signature(spec.outputs) for name, spec in specs.items()} == {
        "image_encoder": ["image_embedding: float32 (1, 256, 64, 64)"],
        "prior": ["prior_logits: float32 (1, 1, 256, 256)"],
        "mask_decoder": ["mask_logits: float32 (1, 1, 256, 256)"],
    }


def test_graph_specs_targets_profile_gives_symbolic_dimension_except_encoder():
    profile = OptimizationProfile(1, 4, 16)
    specs = graph_specs(Geometry(), 64, profile)
    assert specs[PRIOR].inputs[1].shape == ("targets", 64)
    assert specs[PRIOR].outputs[0].shape == ("targets", 1, 256, 256)
    assert specs[MASK_DECODER].inputs[1].shape == ("targets", 1, 256, 256)
    assert specs[MASK_DECODER].outputs[0].shape == ("targets", 1, 256, 256)
    assert specs[PRIOR].targets == specs[MASK_DECODER].targets == profile
    assert specs[IMAGE_ENCODER] == graph_specs(Geometry(), 64)[IMAGE_ENCODER]


def test_graph_specs_fixed_targets_give_static_shape():
    specs = graph_specs(Geometry(), 64, OptimizationProfile(3, 3, 3))
    assert specs[PRIOR].inputs[1].shape == (3, 64)
    assert specs[MASK_DECODER].outputs[0].shape == (3, 1, 256, 256)


def test_graph_specs_images_profile_applies_to_encoder_only():
    geometry = Geometry(image_size=128, patch_size=8)
    targets, images = OptimizationProfile(1, 4, 16), OptimizationProfile(1, 2, 8)
    specs = graph_specs(geometry, 64, targets, images)
    assert specs[IMAGE_ENCODER].profile == images
    assert [specs[name].profile for name in (PRIOR, MASK_DECODER)] == [targets] * 2
    assert specs[IMAGE_ENCODER].inputs[0].shape == ("images", 3, 128, 128)
    assert specs[IMAGE_ENCODER].outputs[0].shape_for(3) == (3, 256, 16, 16)
    for name in (PRIOR, MASK_DECODER):
        assert specs[name].inputs[0].shape == (1, 256, 16, 16)


def test_graph_spec_count_of_returns_number_from_input_shapes():
    specs = graph_specs(Geometry(), 64, OptimizationProfile(1, 4, 16), OptimizationProfile(1, 2, 8))
    assert specs[IMAGE_ENCODER].count_of({"image": (5, 3, 1024, 1024)}) == 5
    shapes = {"image_embedding": (1, 256, 64, 64), "concentration": (7, 64)}
    assert specs[PRIOR].count_of(shapes) == 7
    assert graph_specs(Geometry(), 64)[PRIOR].count_of(shapes) is None
