"""A bundle for pictures of one aspect: exact, or said not to be where padding is dropped."""

import json
import re
import shutil

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from coprs_deploy.artifacts import record_files
from coprs_deploy.bundle import open_bundle, write_manifest
from coprs_deploy.checkpoint import load_segmentation_model, read_checkpoint
from coprs_deploy.cli.main import main
from coprs_deploy.engines import ONNX_RUNTIMES, RunnerOptions, SegmentationGraphs, open_bundle_graph
from coprs_deploy.errors import EquivalenceError, ImageSizeError
from coprs_deploy.export import ExportOptions, export_checkpoint, exporter, graph_check
from coprs_deploy.export.comparison import MODULE, OF_ONE_ASPECT, TRACED, compare_backends
from coprs_deploy.export.comparison_page import chain_page
from coprs_deploy.export.equivalence import TOLERANCES, sample_inputs
from coprs_deploy.export.graph_check import WITHOUT_PADDING
from coprs_deploy.export.verifier import verify_bundle
from coprs_deploy.images import ResizeTransform, check_valid_region, prepare_image, unpadded_size
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.runtime import CoPRS
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR, Geometry, OptimizationProfile, ValidRegion

WIDE = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
ROUNDING = TOLERANCES["onnxruntime", "fp32"][IMAGE_ENCODER].relative_error


@pytest.fixture(scope="module")
def exact(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("aspect_ratio") / "bundle"
    return export_checkpoint(tiny_checkpoint, out, ExportOptions(aspect_ratio=(16, 9))).bundle


@pytest.fixture(scope="module")
def dropping(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("dropping") / "bundle"
    options = ExportOptions(aspect_ratio=(16, 9), drop_padding=True)
    return export_checkpoint(tiny_checkpoint, out, options).bundle


@pytest.fixture(scope="module")
def whole_encoder(tiny_checkpoint):
    return load_segmentation_model(read_checkpoint(tiny_checkpoint)).image_encoder


def encode(bundle, runtime="onnxruntime"):
    prepared = prepare_image(WIDE, bundle.manifest.geometry)
    with open_bundle_graph(bundle, IMAGE_ENCODER, RunnerOptions(num_threads=1), runtime) as runner:
        return runner(image=prepared.image)["image_embedding"].numpy()


def wanted(encoder, geometry):
    with torch.inference_mode():
        return encoder(torch.from_numpy(prepare_image(WIDE, geometry).image)).numpy()


@pytest.mark.parametrize("runtime", ONNX_RUNTIMES)
def test_the_graph_of_an_aspect_gives_what_the_whole_encoder_gives(exact, whole_encoder, runtime):
    expected = wanted(whole_encoder, exact.manifest.geometry)
    assert np.abs(encode(exact, runtime) - expected).max() <= ROUNDING * np.abs(expected).max()


def test_the_manifest_says_what_the_encoder_takes(exact, dropping):
    # Windows of 6 cells of 8 pixels: two of them hold 72 rows. Cells hold them to the pixel.
    assert exact.manifest.graphs[IMAGE_ENCODER].spec.valid_region == ValidRegion((16, 9), 96, 128)
    alone = dropping.manifest.graphs[IMAGE_ENCODER].spec.valid_region
    assert alone == ValidRegion((16, 9), 72, 128, True)
    assert exact.manifest.graphs[PRIOR].spec.valid_region is None
    assert [r.graph for r in exact.manifest.equivalence][-1] == "end_to_end"


def test_dropped_padding_changes_the_embedding_and_the_manifest_says_how_much(
    dropping, whole_encoder, tiny_checkpoint
):
    expected = wanted(whole_encoder, dropping.manifest.geometry)
    assert np.abs(encode(dropping) - expected).max() > 10 * ROUNDING * np.abs(expected).max()
    record = dropping.manifest.equivalence[-1]
    assert record.graph == WITHOUT_PADDING
    assert record.passed
    assert not record.has_tolerance
    assert 0 < record.mask_iou < 1
    assert record.relative_error > ROUNDING
    again = verify_bundle(dropping.path, tiny_checkpoint)
    assert [r.graph for r in again] == [r.graph for r in dropping.manifest.equivalence]
    assert all(r.passed for r in again)


def test_a_graph_that_is_not_that_of_its_aspect_is_found(
    exact, dropping, tiny_checkpoint, tmp_path
):
    """The check compares with the whole encoder: a graph without padding does not pass as exact."""
    path = tmp_path / "bundle"
    shutil.copytree(exact.path, path)
    for file in dropping.path.glob(f"{IMAGE_ENCODER}.onnx*"):
        shutil.copy(file, path)
    (path / "manifest.json").unlink()
    policy = tmp_path / "policy"
    shutil.move(path / "policy", policy)
    files = record_files(path)
    shutil.move(policy, path / "policy")
    write_manifest(path, msgspec.structs.replace(exact.manifest, files=files))
    records = verify_bundle(path, tiny_checkpoint)
    assert not records[0].passed


def test_pictures_inside_are_answered_and_others_refused_before_anything_runs(exact, monkeypatch):
    with CoPRS.load(exact.path) as coprs:
        assert "for pictures at least as wide as 16:9;" in coprs.description
        coprs.warm_up()
        for height in (40, 90, 120):  # 120 of 160 come to 96 of 128: the windows hold them too
            answer = coprs.segment(np.resize(WIDE, (height, 160, 3)), "the shape")
            assert answer.masks.shape[1:] == (height, 160)
        asked = []
        monkeypatch.setattr(coprs._policy, "stream", asked.append)
        with pytest.raises(ImageSizeError, match=r"at width 160 the height may be 120; crop"):
            coprs.segment(np.zeros((122, 160, 3), np.uint8), "the shape")
        with pytest.raises(
            ImageSizeError, match=r"at least as wide as 16:9: at width 90 the height may be 67"
        ):
            coprs.segment(WIDE.transpose(1, 0, 2), "the shape")
        with pytest.raises(ImageSizeError):
            next(coprs.segment_many([(np.zeros((160, 160, 3), np.uint8), "the shape")]))
        assert not asked


def test_the_stages_refuse_what_the_runtime_did_not(exact):
    graphs = exact.manifest.graphs
    with SegmentationGraphs(
        {n: open_bundle_graph(exact, n, RunnerOptions()) for n in graphs}
    ) as stages:
        square = prepare_image(np.zeros((9, 9, 3), np.uint8), exact.manifest.geometry)
        with pytest.raises(ImageSizeError):
            stages.encode(square)


@pytest.mark.slow
def test_images_of_an_aspect_go_together(tiny_checkpoint, tmp_path):
    options = ExportOptions(
        aspect_ratio=(16, 9), drop_padding=True, images=OptimizationProfile(1, 2, 3)
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    with CoPRS.load(bundle.path) as coprs:
        coprs.warm_up()
        answers = list(coprs.segment_many([(WIDE, "the shape"), (WIDE[::-1], "the shape")]))
    assert len(answers) == 2


def test_the_answers_of_an_aspect_are_those_of_the_whole_square(exact, tiny_bundle):
    with CoPRS.load(exact.path) as ours, CoPRS.load(tiny_bundle) as theirs:
        one, other = (c.segment(WIDE, "the shape") for c in (ours, theirs))
    assert one.reasoning == other.reasoning
    assert np.mean(one.masks != other.masks) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_typed_graphs_of_an_aspect_pass_their_checks(tiny_checkpoint, tmp_path, precision):
    calibration = None
    if precision == "int8":
        calibration = tmp_path / "pictures"
        calibration.mkdir()
        generator = np.random.default_rng(1)
        for number in range(4):
            pixels = generator.integers(0, 256, (45, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(calibration / f"{number}.png")
    options = ExportOptions(
        precision=precision, calibration=calibration, aspect_ratio=(16, 9), cache=tmp_path / "cache"
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert all(record.passed for record in bundle.manifest.equivalence)


def test_calibration_pictures_that_reach_too_far_are_named(tiny_checkpoint, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (50, 50), (number, 0, 0)).save(pictures / f"{number}.png")
    options = ExportOptions(
        precision="int8", calibration=pictures, aspect_ratio=(16, 9), cache=tmp_path / "cache"
    )
    monkeypatch.setattr(exporter, "write_int8_graph", None)  # nothing is traced before
    message = r"4 of the calibration's pictures.*\d.png: the image is 50 x 50; this image"
    with pytest.raises(ImageSizeError, match=message):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("drops_padding", [False, True])
def test_the_chain_begins_with_the_whole_module(exact, dropping, tiny_checkpoint, drops_padding):
    bundle = dropping if drops_padding else exact
    manifest = bundle.manifest
    valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
    samples = sample_inputs(
        manifest.geometry, manifest.policy.hidden_size, valid_region=valid_region
    )
    links = compare_backends(bundle, read_checkpoint(tiny_checkpoint), samples)
    assert [(link.first, link.second) for link in links[:2]] == [
        (MODULE, OF_ONE_ASPECT),
        (OF_ONE_ASPECT, TRACED),
    ]
    assert all(link.passed for link in links)
    assert (links[0].differences[0].record.relative_error > ROUNDING) == drops_padding
    page = chain_page(bundle, links, len(samples))
    first_section = page.split("<h2>")[1]
    assert ("not judged" in first_section) == drops_padding
    assert ("holds" in first_section) == (not drops_padding)
    assert f"every {'has_tolerance ' if drops_padding else ''}link holds" in page
    assert "pictures at least as wide as 16:9" in page


@pytest.mark.parametrize(
    ("aspect_ratio", "height", "width"),
    [((16, 9), 96, 128), ((9, 16), 128, 72), ((4, 1), 32, 128), ((90, 1), 8, 128)],
)
def test_samples_of_an_extent_fill_it_and_stay_inside(aspect_ratio, height, width):
    geometry, valid_region = Geometry(128, 8, 64), ValidRegion(aspect_ratio, height, width)
    sizes = [
        s.prepared.unpadded_size.tolist()
        for s in sample_inputs(geometry, 4, valid_region=valid_region)
    ]
    assert [height, width] in sizes
    assert all(valid_region.holds(size) for size in sizes)


ASPECTS = [(16, 9), (9, 16), (9, 20), (37, 20), (1, 17), (1, 40), (256, 135), (21, 9), (4, 3)]


def placed(height, width):
    return ResizeTransform(np.array(unpadded_size(height, width, 1024)), (height, width))


@pytest.mark.parametrize("aspect_ratio", ASPECTS)
@pytest.mark.parametrize("drops_padding", [False, True])
def test_pictures_of_the_aspect_are_taken_and_a_refusal_names_what_would_be(
    aspect_ratio, drops_padding
):
    valid_region = SAM_SIZES["vit_b"].picture_extent(aspect_ratio, drops_padding=drops_padding)
    assert str(valid_region).endswith(f" as {aspect_ratio[0]}:{aspect_ratio[1]}")
    for factor in (1, 3, 7, 50, 120):
        check_valid_region(placed(aspect_ratio[1] * factor, aspect_ratio[0] * factor), valid_region)
    for size in ((1000, 1000), (1000, 999), (999, 1000)):
        with pytest.raises(ImageSizeError) as error:
            check_valid_region(placed(*size), valid_region)
        words = re.search(r"at (width|height) (\d+) the \w+ may be (\d+);", str(error.value))
        kept, limit, is_wide = int(words[2]), int(words[3]), words[1] == "width"
        for tried, fits in ((limit, True), (limit + 1, False)):
            sides = (tried, kept) if is_wide else (kept, tried)
            assert valid_region.holds(unpadded_size(*sides, 1024)) == fits


def test_evaluate_says_at_once_which_examples_a_bundle_does_not_take(exact, capsys):
    arguments = ["evaluate", str(exact.path), "--count", "3", "--absent", "0"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "3 of 3 examples cannot be asked; the first, plain-" in message
    assert "judged on --examples of it" in message


def test_the_command_takes_an_aspect(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["export", str(tiny_checkpoint), "--out", str(out), "--aspect", "9:16"]
    assert main([*arguments, "--drop-padding", "--json"]) == 0
    names = [record["graph"] for record in json.loads(capsys.readouterr().out)["equivalence"]]
    assert names[-1] == WITHOUT_PADDING
    assert open_bundle(out).manifest.graphs[IMAGE_ENCODER].spec.valid_region.holds((128, 72))
    assert main(["inspect", str(out)]) == 0
    assert "for pictures at least as high as 9:16 alone: padding is dropped" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aspect", "wide"], "aspect is 'wide'; accepted: W:H, as in 16:9 or 3:4"),
        (["--aspect", "16:0"], "aspect is '16:0'"),
        (["--aspect", "1:1"], "nothing is saved for 1:1"),
        (["--drop-padding"], "no aspect says what that is; accepted: --aspect W:H --drop-padding"),
    ],
)
def test_an_aspect_that_cannot_be_is_refused(tiny_checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "bundle"
    assert main(["export", str(tiny_checkpoint), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_aspect_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"aspect is \(0, 9\); accepted: two numbers from 1"):
        ExportOptions(aspect_ratio=(0, 9))


@pytest.mark.slow
def test_an_int8_encoder_of_an_aspect_that_is_refused_lists_its_blocks(
    tiny_checkpoint, tmp_path, monkeypatch
):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 30), (9 * number, 0, 0)).save(pictures / f"{number}.png")
    refused = TOLERANCES["onnxruntime", "int8"]
    encoder = refused[IMAGE_ENCODER]
    strict = {**refused, IMAGE_ENCODER: type(encoder)(0.0, 0.0, 1.0, None, "nothing passes")}
    monkeypatch.setattr(graph_check, "TOLERANCES", {("onnxruntime", "int8"): strict})
    options = ExportOptions(
        precision="int8", calibration=pictures, aspect_ratio=(16, 9), cache=tmp_path / "cache"
    )
    with pytest.raises(EquivalenceError, match=r"block 0: .*\n  block 1: .*\n  block 2: "):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
