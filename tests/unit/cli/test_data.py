"""The verb ``data``: inspect, check and convert."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.cli.main import main
from coprs_deploy.data.contact_sheet import IGNORED_OUTLINE, draw_targets
from coprs_deploy.data.examples import ExampleFile
from coprs_deploy.data.inspection import check_source
from coprs_deploy.data.readers import known_counts
from coprs_deploy.data.readers.known_counts import KNOWN_COUNTS, SplitCounts, split_with
from coprs_deploy.data.readers.registry import SourceOptions, open_source
from tests.unit.data.readers.layouts import BOXES, HEIGHT, WIDTH, Refer, coco_name, painted
from tests.unit.data.readers.test_hugging_face import MASKS, mask_rows, write_parquet
from tests.unit.data.readers.test_reasonseg import add, corners

FORMS = [form for form in BOXES if form != "empty list"]
COUNTS = {
    "refcoco:unc:train": SplitCounts(6, 12, 6),
    "refcoco:unc:val": SplitCounts(2, 2, 1),
}


@pytest.fixture
def root(tmp_path):
    """RefCOCO with six references in train and two in val, on one image of train."""
    builder = Refer(tmp_path / "data")
    for image_id, form in enumerate(FORMS, start=1):
        builder.refer(image_id, builder.annotate(image_id, form), "train", f"the {form}", "it")
    for form in FORMS[:2]:
        builder.refer(3, builder.annotate(3, form), "val", "a cup of tea")
    return builder.write()


def run(capsys, *arguments):
    """Run the verb with --json; return the exit code and the result."""
    code = main(["data", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_counts_every_split_and_draws_a_sheet(root, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code, result = run(capsys, "inspect", "refcoco", "--root", root, "--out", sheet)
    train, val = result["sources"]
    assert code == 0
    assert [each["source"] for each in (train, val)] == ["refcoco:unc:train", "refcoco:unc:val"]
    assert (train["num_examples"], train["num_images"], train["targets"]) == (12, 6, {"1": 12})
    assert train["sizes"]["width_px"] == {"least": WIDTH, "median": WIDTH, "most": WIDTH}
    shares = [painted(*BOXES[form]).mean() for form in FORMS]
    assert train["sizes"]["target_share"]["most"] == pytest.approx(max(shares))
    assert train["images"].startswith("6 of 6 images found; looked in ")
    assert val["sizes"]["words"]["most"] == 4
    with Image.open(sheet) as image:
        assert image.size[0] > 6 * 320


def test_inspect_lists_invalid_rows_and_examples(root, capsys):
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"][5]["segmentation"] = {"size": [1, 2], "counts": [2]}
    path.write_text(json.dumps(content))
    (root / "images/mscoco/images/train2014" / coco_name(1)).unlink()
    code, result = run(capsys, "inspect", "refcoco:train", "--root", root)
    (found,) = result["sources"]
    assert code == 1
    assert [(p["row"], p["column"]) for p in found["problems"]] == [
        *((1, "image"), (2, "image"), (11, "masks"), (12, "masks")),
    ]
    assert f"missing: {coco_name(1)}" in found["images"]
    assert main(["data", "inspect", "refcoco:train", "--root", str(root)]) == 1
    text = capsys.readouterr().out
    assert "4 invalid:\n  row 1, column image: " in text


def test_inspect_decodes_a_part_if_requested(root, capsys):
    code, result = run(capsys, "inspect", "refcoco:train", "--root", root, "--num-examples", 5)
    assert (code, result["sources"][0]["num_decoded"]) == (0, 5)


def test_contact_sheet_outlines_the_ignore_mask(tmp_path):
    shapes = [("target", corners(2, 2, 9, 9)), ("ignore", corners(12, 2, 30, 20))]
    add(tmp_path, "1", ["cup"], shapes)
    (example,) = open_source("reasonseg:val", SourceOptions(tmp_path))
    drawn = np.array(draw_targets(example))
    outlined = (drawn == IGNORED_OUTLINE).all(axis=2)
    assert outlined[:, 110:].any() and not outlined[:, :110].any()


@pytest.fixture
def small_counts(monkeypatch):
    monkeypatch.setattr("coprs_deploy.data.inspection.KNOWN_COUNTS", COUNTS)
    monkeypatch.setattr(known_counts, "KNOWN_COUNTS", COUNTS)


def test_check_of_a_complete_data_set_returns_0(root, capsys, small_counts):
    assert main(["data", "check", "refcoco", "--root", str(root)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "refcoco:unc:train: complete (6 refs, 12 sentences, 6 images)",
        "refcoco:unc:val: complete (2 refs, 2 sentences, 1 images)",
    ]


def test_check_of_an_incomplete_download_says_what_is_missing(root, capsys, small_counts):
    path = root / "refcoco/refs(unc).p"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes())[1:]))
    (root / "images/mscoco/images/train2014" / coco_name(2)).write_bytes(b"")
    (root / "images/mscoco/images/train2014" / coco_name(3)).unlink()
    code, result = run(capsys, "check", "refcoco:train", "--root", root)
    (found,) = result["sources"]
    assert code == 1
    counts, images, empty = found["failures"][:3], found["failures"][3], found["failures"][4]
    assert counts == ["5 of 6 refs", "10 of 12 sentences", "5 of 6 images"]
    assert images.startswith("4 of 5 images found; looked in ")
    assert empty == f"1 image files are empty, {coco_name(2)} first"
    assert found["known"] == {"refs": 6, "sentences": 12, "images": 6}


def test_check_recognizes_the_counts_of_another_split(root, small_counts):
    val = open_source("refcoco:val", SourceOptions(root))
    val.description = "refcoco:unc:train"
    failures = check_source(val).failures
    assert failures[-1] == "these are the counts of refcoco:unc:val"


def test_check_of_a_file_of_unknown_size_says_so(tmp_path, capsys):
    path = write_parquet(tmp_path / "masks.parquet", mask_rows())
    assert main(["data", "check", str(path)]) == 0
    text = capsys.readouterr().out
    assert text == "masks.parquet: readable; its size is not known (5 sentences, 5 images)\n"


def test_known_counts_add_up_to_the_published_totals():
    totals = {"refcoco:unc": 142_210, "refcoco+:unc": 141_564, "refcocog:umd": 95_010}
    totals |= {"refcocog:google": 95_010, "grefcoco:unc": 259_859}
    for name, total in totals.items():
        counts = [c.sentences for key, c in KNOWN_COUNTS.items() if key.startswith(f"{name}:")]
        assert sum(counts) == total, name
    assert split_with(SplitCounts(2_573, 1, 1_300)) == "refcocog:umd:val"
    assert split_with(SplitCounts(1, 1, 1)) == ""


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("embed", [False, True])
def test_convert_writes_examples_that_are_read_back(root, tmp_path, capsys, suffix, embed):
    out = tmp_path / f"train{suffix}"
    options = ["--embed-images"] if embed else []
    code, result = run(capsys, "convert", "refcoco:train", "--root", root, "--out", out, *options)
    assert (code, result["num_written"], result["problems"]) == (0, 12, [])
    converted, source = ExampleFile(out), open_source("refcoco:train", SourceOptions(root))
    for found, expected in zip(converted, source, strict=True):
        np.testing.assert_array_equal(found.image, expected.image)
        np.testing.assert_array_equal(found.masks, expected.masks)
        assert (found.id, found.instruction) == (expected.id, expected.instruction)
        assert found.source == "refcoco:unc:train"
    original = source.image_file(0)
    assert converted.image_file(0) == (original.read_bytes() if embed else original)


def test_convert_keeps_ignore_masks_and_question_types(tmp_path, capsys):
    shapes = [("target", corners(2, 2, 9, 9)), ("ignore", corners(12, 2, 30, 20))]
    add(tmp_path, "1", ["cup"], shapes)
    out = tmp_path / "val.parquet"
    assert run(capsys, "convert", "reasonseg:val", "--root", tmp_path, "--out", out)[0] == 0
    (found,) = ExampleFile(out)
    np.testing.assert_array_equal(found.ignore_mask, painted((12, 2, 30, 20)))
    assert found.question_type == "long"


def test_convert_leaves_out_images_of_other_splits(root, tmp_path, capsys):
    out = tmp_path / "train.jsonl"
    arguments = ["convert", "refcoco:train", "--root", root, "--out", out]
    code, result = run(capsys, *arguments, "--exclude-images-of", "refcoco")
    assert code == 0
    assert result["excluded_sources"] == ["refcoco:unc:val"]
    assert (result["num_written"], result["num_excluded"]) == (10, 2)
    assert result["num_excluded_images"] == 1
    assert "coco-3" not in {ExampleFile(out).image_name(index) for index in range(10)}


def test_convert_of_several_sources_keeps_ids_apart_and_bytes(root, tmp_path, capsys):
    masks = write_parquet(tmp_path / "masks.parquet", mask_rows())
    out = tmp_path / "all.parquet"
    code, result = run(capsys, "convert", "refcoco:val", masks, "--root", root, "--out", out)
    assert (code, result["num_written"]) == (0, 7)
    found = ExampleFile(out)
    assert len({example.id for example in found}) == 7
    assert found[0].id.startswith("refcoco:unc:val:")
    np.testing.assert_array_equal(found[2].masks, [MASKS[0]])
    assert found[2].image.shape == (HEIGHT, WIDTH, 3)
    assert len(found[6].masks) == 0


def test_convert_leaves_out_invalid_examples_and_returns_1(root, tmp_path, capsys):
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"][5]["segmentation"] = {"size": [1, 2], "counts": [2]}
    path.write_text(json.dumps(content))
    out = tmp_path / "train.jsonl"
    code, result = run(capsys, "convert", "refcoco:train", "--root", root, "--out", out)
    assert (code, result["num_written"], len(result["problems"])) == (1, 10, 2)
    assert result["problems"][0].startswith("refcoco:unc:train, example 11, masks: annotation 135")


@pytest.mark.filterwarnings("ignore:.*rows are invalid and skipped:UserWarning")
def test_convert_of_a_source_with_an_invalid_row_returns_1(root, tmp_path, capsys):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert run(capsys, "convert", "refcoco:val", "--root", root, "--out", first)[0] == 0
    with first.open("a") as file:
        file.write('{"id": "last"}\n')
    code, result = run(capsys, "convert", first, "--out", second)
    assert (code, result["num_written"]) == (1, 2)
    (problem,) = result["problems"]
    assert problem.startswith(f"{first}, row 3, column instruction: ")


def test_convert_without_images_is_refused_before_it_writes(root, tmp_path, capsys):
    (root / "images/mscoco/images/train2014" / coco_name(2)).unlink()
    out = tmp_path / "train.jsonl"
    code, result = run(capsys, "convert", "refcoco:train", "--root", root, "--out", out)
    assert (code, result["type"]) == (2, "ArtifactError")
    assert "5 of 6 images found" in result["error"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "x"], "--out is missing; name a file that ends in .parquet or .jsonl"),
        (["convert", "x", "--out", "x.png"], "--out is x.png; accepted: a name that ends in"),
        (["inspect", "x", "--out", "x.jsonl"], "--out is x.jsonl; accepted: a name that ends in"),
        (["check", "x", "--out", "x.png"], "`data check` writes no file"),
        (["check", "x", "--embed-images"], "--embed-images is an option of `data convert`, not"),
        (["check", "x", "--first-sentences"], "is an option of `data inspect` and `data convert`"),
        (["inspect", "x", "--num-examples", "0"], "--num-examples is 0; it must be at least 1"),
        (["inspect", "refcoko"], "did you mean refcoco?"),
        (["inspect", "synthetic:plain"], "write them with `coprs-deploy synth --out FILE.parquet`"),
    ],
)
def test_wrong_use_is_refused_with_what_is_accepted(capsys, arguments, message):
    code, result = run(capsys, *arguments)
    assert code == 2
    assert message in result["error"]
