"""The forms of bundles that rows are measured in, told apart by what their manifests say."""

from dataclasses import asdict

import pytest

from coprs_deploy.benchmarks import run, steps
from coprs_deploy.benchmarks.arrays import read_inputs
from coprs_deploy.benchmarks.form import ANY_PICTURE, Form
from coprs_deploy.benchmarks.inputs import write_inputs
from coprs_deploy.benchmarks.suites import suite
from coprs_deploy.benchmarks.suites.engines import forms
from coprs_deploy.benchmarks.workshop import Model, Workshop
from coprs_deploy.bundle import read_manifest
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER

MANY = Form(targets="1,4,16", images="1,2,8")
WIDE = Form(aspect_ratio="16:9")
ALONE = Form(aspect_ratio="16:9", drop_padding=True)


def test_each_form_has_a_folder_of_its_own():
    suffixes = [form.suffix for form in (ANY_PICTURE, MANY, WIDE, ALONE)]
    assert suffixes == ["1x1", "1-4-16x1-2-8", "1x1-16to9", "1x1-16to9-alone"]
    assert [form.pictures for form in (MANY, WIDE, ALONE)] == [
        "",
        "for 16:9",
        "for 16:9 without padding",
    ]


@pytest.mark.parametrize("form", [WIDE, ALONE])
def test_a_bundle_is_of_the_form_that_it_was_exported_in(form, tiny_checkpoint, tmp_path):
    out = tmp_path / "bundle"
    made = steps.export_bundle(
        str(tiny_checkpoint), str(out), "onnxruntime", "fp32", **asdict(form)
    )
    manifest = read_manifest(out)
    forms_here = (ANY_PICTURE, WIDE, ALONE, MANY)
    assert [other for other in forms_here if other.is_of(manifest)] == [form]
    assert Form.of_pictures(manifest) == form
    assert ("without_padding" in made["equality"]) == form.drop_padding


def test_a_bundle_of_any_picture_is_of_no_aspect(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    assert ANY_PICTURE.is_of(manifest)
    assert Form.of_pictures(manifest) == ANY_PICTURE
    assert not WIDE.is_of(manifest)
    assert not MANY.is_of(manifest)


@pytest.mark.parametrize(("aspect_ratio", "sides"), [("9:16", (128, 72)), ("16:9", (72, 128))])
def test_inputs_fit_the_aspect_that_they_are_drawn_for(tiny_bundle, tmp_path, aspect_ratio, sides):
    for wanted in ("", aspect_ratio, aspect_ratio):
        write_inputs(str(tmp_path), None, str(tiny_bundle), False, 3, aspect_ratio=wanted)
        sizes = [sample["unpadded_size"].tolist() for sample in read_inputs(str(tmp_path))]
        assert len(sizes) == 3
        inside = [height <= sides[0] and width <= sides[1] for height, width in sizes]
        assert all(inside) == bool(wanted)


@pytest.mark.slow
def test_a_workshop_exports_int8_for_an_aspect(tiny_checkpoint, tmp_path):
    model = Model("tiny", tiny_checkpoint, None, is_random=True)
    with Workshop(tmp_path, model, sizes=("tiny",)) as workshop:
        made = workshop.bundle(model, "onnxruntime", "int8", ALONE)
        assert not made.problem
        assert ALONE.is_of(read_manifest(made.path))
        assert workshop.bundle(model, "openvino", "int8", ALONE).path == made.path


def test_suites_of_square_scenes_are_left_out_for_a_bundle_of_one_aspect(tmp_path):
    model = Model("mine", None, None, form=WIDE)
    with Workshop(tmp_path, model) as workshop:
        plan = run._plan(suite("answer"), workshop)
    assert not plan.groups
    assert plan.left_out[0].reason == "it asks about square scenes, and the bundle is for 16:9"


@pytest.mark.parametrize(
    ("graph", "precision", "is_random", "count"),
    [
        (IMAGE_ENCODER, "fp32", True, 3),
        (IMAGE_ENCODER, "int8", True, 3),
        (IMAGE_ENCODER, "fp16", True, 1),
        (IMAGE_ENCODER, "fp32", False, 1),
        (MASK_DECODER, "fp32", True, 1),
    ],
)
def test_only_encoders_of_real_size_are_measured_for_an_aspect(graph, precision, is_random, count):
    assert len(forms(Model("any", None, None, is_random=is_random), graph, precision)) == count
