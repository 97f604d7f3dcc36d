"""The forms of bundles that rows are measured in, told apart by what their manifests say."""

from dataclasses import asdict

import pytest

from coprs_deploy.benchmarks import steps
from coprs_deploy.benchmarks.arrays import read_inputs
from coprs_deploy.benchmarks.form import ANY_PICTURE, Form
from coprs_deploy.benchmarks.inputs import write_inputs
from coprs_deploy.benchmarks.suites.engines import forms
from coprs_deploy.benchmarks.workshop import Model
from coprs_deploy.bundle import read_manifest
from coprs_deploy.specs import IMAGE_ENCODER, MASK_DECODER, PictureExtent

MANY = Form(targets="1,4,16", images="1,2,8")
WIDE = Form(aspect="16:9")
ALONE = Form(aspect="16:9", drop_padding=True)


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
    assert [other for other in (WIDE, ALONE, MANY) if other.is_of(manifest)] == [form]
    assert ANY_PICTURE.is_of(manifest)  # a bundle that a user names is measured as it is
    assert ("without_padding" in made["equality"]) == form.drop_padding
    write_inputs(str(tmp_path / "inputs"), None, str(out), False, 2)
    assert (tmp_path / "inputs" / "complete.json").is_file()


def test_a_bundle_of_any_picture_is_of_no_aspect(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    assert ANY_PICTURE.is_of(manifest)
    assert not WIDE.is_of(manifest)
    assert not MANY.is_of(manifest)


def test_inputs_fit_the_aspect_that_rows_are_for(tiny_bundle, tmp_path):
    write_inputs(str(tmp_path), None, str(tiny_bundle), False, 3)
    sizes = [sample["unpadded_size"].tolist() for sample in read_inputs(str(tmp_path))]
    assert len(sizes) == 3
    assert all(PictureExtent(72, 128).holds(size) for size in sizes)


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
