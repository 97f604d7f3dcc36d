"""Bundles for a fixed aspect ratio: exact, or with dropped padding."""

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
from coprs_deploy.export import ExportOptions, export_checkpoint, exporter
from coprs_deploy.export.comparison import FIXED_ASPECT_MODULE, MODULE, TRACED, compare_backends
from coprs_deploy.export.comparison_page import comparison_page_html
from coprs_deploy.export.graph_check import WITHOUT_PADDING
from coprs_deploy.export.samples import sample_inputs
from coprs_deploy.export.tolerances import TOLERANCES
from coprs_deploy.export.verifier import verify_bundle
from coprs_deploy.images import ResizeTransform, check_valid_region, prepare_image, unpadded_size
from coprs_deploy.model_config import SAM_SIZES
from coprs_deploy.runtime import CoPRS
from coprs_deploy.specs import IMAGE_ENCODER, PRIOR, Geometry, OptimizationProfile, ValidRegion

WIDE = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
ROUNDING = TOLERANCES["onnxruntime", "fp32"][IMAGE_ENCODER].relative_error


@pytest.fixture(scope="module")
def exact(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("fixed") / "bundle"
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
def test_fixed_aspect_graph_equals_whole_encoder(exact, whole_encoder, runtime):
    expected = wanted(whole_encoder, exact.manifest.geometry)
    assert np.abs(encode(exact, runtime) - expected).max() <= ROUNDING * np.abs(expected).max()


def test_fixed_aspect_manifest_records_valid_region(exact, dropping):
    # Windows of 6 cells of 8 pixels: two of them hold 72 rows. Cells hold them to the pixel.
    assert exact.manifest.graphs[IMAGE_ENCODER].spec.valid_region == ValidRegion((16, 9), 96, 128)
    alone = dropping.manifest.graphs[IMAGE_ENCODER].spec.valid_region
    assert alone == ValidRegion((16, 9), 72, 128, True)
    assert exact.manifest.graphs[PRIOR].spec.valid_region is None
    assert [r.graph for r in exact.manifest.equivalence][-1] == "end_to_end"


def test_dropped_padding_effect_is_recorded_in_manifest(dropping, whole_encoder, tiny_checkpoint):
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


def test_verify_graph_without_its_valid_region_fails(exact, dropping, tiny_checkpoint, tmp_path):
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


def test_segment_images_outside_valid_region_are_refused_first(exact, monkeypatch):
    with CoPRS.load(exact.path) as coprs:
        assert "for images at least as wide as 16:9;" in coprs.description
        coprs.warm_up()
        for height in (40, 90, 120):  # 120 of 160 come to 96 of 128: the windows hold them too
            result = coprs.segment(np.resize(WIDE, (height, 160, 3)), "the shape")
            assert result.masks.shape[1:] == (height, 160)
        requests = []
        monkeypatch.setattr(coprs._policy, "stream", requests.append)
        with pytest.raises(ImageSizeError, match=r"at width 160 the height may be 120; crop"):
            coprs.segment(np.zeros((122, 160, 3), np.uint8), "the shape")
        with pytest.raises(
            ImageSizeError, match=r"at least as wide as 16:9: at width 90 the height may be 67"
        ):
            coprs.segment(WIDE.transpose(1, 0, 2), "the shape")
        with pytest.raises(ImageSizeError):
            next(coprs.segment_many([(np.zeros((160, 160, 3), np.uint8), "the shape")]))
        assert not requests


def test_graphs_encode_image_outside_valid_region_is_refused(exact):
    graphs = exact.manifest.graphs
    with SegmentationGraphs(
        {n: open_bundle_graph(exact, n, RunnerOptions()) for n in graphs}
    ) as opened:
        square = prepare_image(np.zeros((9, 9, 3), np.uint8), exact.manifest.geometry)
        with pytest.raises(ImageSizeError):
            opened.encode(square)


@pytest.mark.slow
def test_graphs_encode_batch_of_fixed_aspect_images(tiny_checkpoint, tmp_path):
    options = ExportOptions(
        aspect_ratio=(16, 9), drop_padding=True, images=OptimizationProfile(1, 2, 3)
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    with CoPRS.load(bundle.path) as coprs:
        coprs.warm_up()
        results = list(coprs.segment_many([(WIDE, "the shape"), (WIDE[::-1], "the shape")]))
    assert len(results) == 2


def test_segment_fixed_aspect_result_equals_whole_square(exact, tiny_bundle):
    with CoPRS.load(exact.path) as ours, CoPRS.load(tiny_bundle) as theirs:
        one, other = (c.segment(WIDE, "the shape") for c in (ours, theirs))
    assert one.reasoning == other.reasoning
    assert np.mean(one.masks != other.masks) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_export_fixed_aspect_lower_precision_passes(tiny_checkpoint, tmp_path, precision):
    calibration = None
    if precision == "int8":
        calibration = tmp_path / "images"
        calibration.mkdir()
        generator = np.random.default_rng(1)
        for number in range(4):
            pixels = generator.integers(0, 256, (45, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(calibration / f"{number}.png")
    options = ExportOptions(
        precision=precision,
        calibration_images=calibration,
        aspect_ratio=(16, 9),
        cache_dir=tmp_path / "cache",
    )
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options).bundle
    assert all(record.passed for record in bundle.manifest.equivalence)


def test_export_calibration_images_outside_valid_region_are_named(
    tiny_checkpoint, tmp_path, monkeypatch
):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (50, 50), (number, 0, 0)).save(images / f"{number}.png")
    options = ExportOptions(
        precision="int8",
        calibration_images=images,
        aspect_ratio=(16, 9),
        cache_dir=tmp_path / "cache",
    )
    monkeypatch.setattr(exporter, "write_int8_graph", None)  # nothing is traced before
    message = r"4 calibration images do not fit.*\d.png: the image is 50 x 50; this image"
    with pytest.raises(ImageSizeError, match=message):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("drops_padding", [False, True])
def test_compare_backends_fixed_aspect_starts_with_whole_module(
    exact, dropping, tiny_checkpoint, drops_padding
):
    bundle = dropping if drops_padding else exact
    manifest = bundle.manifest
    valid_region = manifest.graphs[IMAGE_ENCODER].spec.valid_region
    samples = sample_inputs(
        manifest.geometry, manifest.policy.hidden_size, valid_region=valid_region
    )
    comparisons = compare_backends(bundle, read_checkpoint(tiny_checkpoint), samples)
    assert [(result.reference, result.candidate) for result in comparisons[:2]] == [
        (MODULE, FIXED_ASPECT_MODULE),
        (FIXED_ASPECT_MODULE, TRACED),
    ]
    assert all(result.passed for result in comparisons)
    assert (comparisons[0].differences[0].record.relative_error > ROUNDING) == drops_padding
    page = comparison_page_html(bundle, comparisons, len(samples))
    first_section = page.split("<h2>")[1]
    assert ("no tolerance" in first_section) == drops_padding
    assert (">passed<" in first_section) == (not drops_padding)
    verdict = "all that have a tolerance are within it" if drops_padding else "all within tolerance"
    assert verdict in page
    assert "images at least as wide as 16:9" in page


@pytest.mark.parametrize(
    ("aspect_ratio", "height", "width"),
    [((16, 9), 96, 128), ((9, 16), 128, 72), ((4, 1), 32, 128), ((90, 1), 8, 128)],
)
def test_sample_inputs_fill_valid_region_and_stay_inside(aspect_ratio, height, width):
    geometry, valid_region = Geometry(128, 8, 64), ValidRegion(aspect_ratio, height, width)
    sizes = [
        s.prepared.unpadded_size.tolist()
        for s in sample_inputs(geometry, 4, valid_region=valid_region)
    ]
    assert [height, width] in sizes
    assert all(valid_region.contains(size) for size in sizes)


ASPECT_RATIOS = [(16, 9), (9, 16), (9, 20), (37, 20), (1, 17), (1, 40), (256, 135), (21, 9), (4, 3)]


def resized(height, width):
    return ResizeTransform(np.array(unpadded_size(height, width, 1024)), (height, width))


@pytest.mark.parametrize("aspect_ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("drops_padding", [False, True])
def test_check_image_outside_valid_region_names_accepted_size(aspect_ratio, drops_padding):
    valid_region = SAM_SIZES["vit_b"].valid_region(aspect_ratio, drops_padding=drops_padding)
    assert str(valid_region).endswith(f" as {aspect_ratio[0]}:{aspect_ratio[1]}")
    for factor in (1, 3, 7, 50, 120):
        check_valid_region(
            resized(aspect_ratio[1] * factor, aspect_ratio[0] * factor), valid_region
        )
    for size in ((1000, 1000), (1000, 999), (999, 1000)):
        with pytest.raises(ImageSizeError) as error:
            check_valid_region(resized(*size), valid_region)
        words = re.search(r"at (width|height) (\d+) the \w+ may be (\d+);", str(error.value))
        kept, limit, is_wide = int(words[2]), int(words[3]), words[1] == "width"
        for tried, fits in ((limit, True), (limit + 1, False)):
            sides = (tried, kept) if is_wide else (kept, tried)
            assert valid_region.contains(unpadded_size(*sides, 1024)) == fits


def test_evaluate_examples_outside_valid_region_are_refused_first(exact, capsys):
    arguments = ["evaluate", str(exact.path), "--num-examples", "3", "--num-no-match", "0"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "does not accept the first image of synthetic:plain" in message
    assert "on a --dataset of that aspect ratio" in message


@pytest.mark.slow
def test_export_command_aspect_ratio_is_recorded(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["export", str(tiny_checkpoint), "--out", str(out), "--aspect-ratio", "9:16"]
    assert main([*arguments, "--drop-padding", "--json"]) == 0
    names = [record["graph"] for record in json.loads(capsys.readouterr().out)["equivalence"]]
    assert names[-1] == WITHOUT_PADDING
    assert open_bundle(out).manifest.graphs[IMAGE_ENCODER].spec.valid_region.contains((128, 72))
    assert main(["inspect", str(out)]) == 0
    assert "for images at least as tall as 9:16: padding is dropped" in (capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aspect-ratio", "wide"], "aspect ratio is 'wide'; accepted: W:H, such as 16:9 or 3:4"),
        (["--aspect-ratio", "16:0"], "aspect ratio is '16:0'"),
        (["--aspect-ratio", "1:1"], "aspect ratio 1:1 saves nothing"),
        (
            ["--drop-padding"],
            "aspect_ratio is not set; accepted: --aspect-ratio W:H --drop-padding",
        ),
    ],
)
def test_export_command_impossible_aspect_ratio_is_refused(
    tiny_checkpoint, tmp_path, capsys, arguments, message
):
    out = tmp_path / "bundle"
    assert main(["export", str(tiny_checkpoint), "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_export_options_zero_aspect_ratio_is_refused():
    with pytest.raises(
        ValueError, match=r"aspect_ratio is \(0, 9\); accepted: two positive integers"
    ):
        ExportOptions(aspect_ratio=(0, 9))


@pytest.mark.slow
def test_export_refused_int8_fixed_aspect_encoder_lists_blocks(
    tiny_checkpoint, tmp_path, monkeypatch
):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 30), (9 * number, 0, 0)).save(images / f"{number}.png")
    refused = TOLERANCES["onnxruntime", "int8"]
    encoder = refused[IMAGE_ENCODER]
    strict = {**refused, IMAGE_ENCODER: type(encoder)(0.0, 0.0, 1.0, None, "nothing passes")}
    monkeypatch.setattr(exporter, "TOLERANCES", {("onnxruntime", "int8"): strict})
    options = ExportOptions(
        precision="int8",
        calibration_images=images,
        aspect_ratio=(16, 9),
        cache_dir=tmp_path / "cache",
    )
    with pytest.raises(EquivalenceError, match=r"block 0: .*\n  block 1: .*\n  block 2: "):
        export_checkpoint(tiny_checkpoint, tmp_path / "bundle", options)
