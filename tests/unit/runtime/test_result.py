"""SegmentationResult: arrays, scores, exporters and files."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from coprs_deploy.errors import MissingDependencyError, install_hint
from coprs_deploy.images import ResizeTransform
from coprs_deploy.logits import resize_logits, sigmoid
from coprs_deploy.runtime import PriorEvent, SegmentationResult, Timings
from coprs_deploy.runtime.result import LowResolutionLogits
from coprs_deploy.specs import Geometry
from coprs_deploy.visualization import draw_overlay

HEIGHT, WIDTH = 30, 50
GEOMETRY = Geometry(image_size=64, patch_size=8, out_chans=8)

PYCOCOTOOLS_DECODES = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
"""The package only encodes; decoding in pycocotools 2.0 warns under numpy 2."""


def low_resolution(logits):
    resize = ResizeTransform.of(np.zeros((HEIGHT, WIDTH, 3), np.uint8), GEOMETRY)
    return LowResolutionLogits(logits, resize, GEOMETRY)


def random_logits(generator, num_targets=1):
    side = GEOMETRY.mask_size
    return low_resolution(
        4 * generator.standard_normal((num_targets, 1, side, side), dtype=np.float32)
    )


def make_result(num_targets=1, **changes):
    generator = np.random.default_rng(0)
    prior_logits, mask_logits = (random_logits(generator, num_targets) for _ in range(2))
    values = {
        "masks": mask_logits.at_original_size > 0,
        "reasoning": "the red disc is on the left",
        "response": "<think>the red disc is on the left</think><REF_POS>",
        "stop_reason": "targets_reached" if num_targets else "end_of_text",
        "format_violations": (),
        "instruction": "the “red” disc",
        "timings": Timings(total_ms=12.4, response_tokens=9),
        "runtime": "graphs: one; policy: another",
        "image": generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
        "_mask_logits": mask_logits,
        "_prior_logits": prior_logits,
    }
    return SegmentationResult(**{**values, **changes})


def rectangle(y1, y2, x1, x2):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


class TestArrays:
    def test_mask_and_prior_are_those_of_the_last_target(self):
        result = make_result(num_targets=3)
        assert np.array_equal(result.mask, result.masks[2])
        assert np.array_equal(result.prior, sigmoid(result.prior_logits[2]))
        assert not np.array_equal(result.masks[1], result.masks[2])

    def test_prior_is_a_heat_map_between_0_and_1(self):
        prior = make_result().prior
        assert prior.shape == (HEIGHT, WIDTH)
        assert prior.dtype == np.float32
        assert 0 <= prior.min() < 0.1 < 0.9 < prior.max() <= 1

    def test_logits_are_resized_once_on_first_access(self, monkeypatch):
        result = make_result(num_targets=2)
        calls = []

        def resize(logits, sizes, geometry):
            calls.append(logits)
            return resize_logits(logits, sizes, geometry)

        monkeypatch.setattr("coprs_deploy.runtime.result.resize_logits", resize)
        logits = random_logits(np.random.default_rng(1), 2)
        fresh = dataclasses.replace(result, _prior_logits=logits)
        assert not calls
        assert fresh.prior_logits.shape == (2, HEIGHT, WIDTH)
        event = PriorEvent(logits)
        assert event.prior_logits is fresh.prior_logits
        assert np.array_equal(event.prior, fresh.prior)
        assert len(calls) == 1 and calls[0] is logits.logits

    def test_masks_are_mask_logits_above_0(self):
        result = make_result(num_targets=2)
        assert result.mask_logits.shape == result.masks.shape
        assert np.array_equal(result.masks, result.mask_logits > 0)

    def test_no_match_has_empty_arrays_and_a_zero_prior(self):
        result = make_result(num_targets=0)
        assert not result.found
        assert result.mask.shape == result.prior.shape == (HEIGHT, WIDTH)
        assert result.mask.dtype == np.bool_
        assert not result.mask.any()
        assert result.prior.dtype == np.float32
        assert not result.prior.any()
        assert result.scores.shape == result.areas.shape == (0,)
        assert result.boxes.shape == (0, 4)

    def test_boxes_and_areas_are_those_of_the_masks(self):
        masks = np.stack(
            [
                rectangle(0, HEIGHT, 0, WIDTH),
                rectangle(3, 4, 7, 8),
                rectangle(2, 5, 10, 20) | rectangle(20, 25, 5, 6),
                rectangle(0, 0, 0, 0),
            ]
        )
        result = make_result(masks=masks)
        assert result.boxes.tolist() == [[0, 0, 50, 30], [7, 3, 8, 4], [5, 2, 20, 25], [0, 0, 0, 0]]
        assert result.areas.tolist() == [1500, 1, 35, 0]


class TestScores:
    def test_score_is_the_ratio_of_areas_above_both_offsets_inside_the_image(self):
        side = GEOMETRY.mask_size  # 32 cells of 2 pixels; the image covers 64 x 38 pixels: 19 rows
        logits = np.full((2, 1, side, side), -5.0, dtype=np.float32)
        logits[0, 0, :4, :10] = 5.0
        logits[0, 0, 4, :10] = 0.5  # above -1 only
        logits[0, 0, 19:] = 5.0  # padding
        logits[1, 0, :2] = 1.0  # not above 1
        result = make_result(num_targets=2, _mask_logits=low_resolution(logits))
        assert result.scores.tolist() == [40 / 50, 0.0]

    def test_score_of_an_empty_mask_is_0(self):
        side = GEOMETRY.mask_size
        logits = low_resolution(np.full((1, 1, side, side), -5.0, dtype=np.float32))
        assert logits.stability_scores.tolist() == [0.0]

    def test_score_equals_the_definition_of_segment_anything(self):
        logits = random_logits(np.random.default_rng(3), 4)
        inside = logits.logits[:, 0, :19]
        expected = (inside > 1.0).sum((1, 2)) / (inside > -1.0).sum((1, 2))
        np.testing.assert_allclose(logits.stability_scores, expected)
        assert logits.stability_scores is logits.stability_scores  # computed once


class TestExporters:
    @PYCOCOTOOLS_DECODES
    @pytest.mark.parametrize("num_targets", [1, 2])
    def test_to_json_masks_decode_to_the_masks(self, num_targets):
        result = make_result(num_targets)
        encoded = json.loads(json.dumps(result.to_json()))["masks"]
        assert [entry["size"] for entry in encoded] == [[HEIGHT, WIDTH]] * num_targets
        for entry, mask in zip(encoded, result.masks, strict=True):
            assert np.array_equal(coco.decode(entry).astype(bool), mask)

    @PYCOCOTOOLS_DECODES
    @pytest.mark.parametrize("value", [False, True])
    def test_to_json_holds_for_empty_and_full_masks(self, value):
        masks = np.full((1, HEIGHT, WIDTH), value)
        (encoded,) = make_result(masks=masks).to_json()["masks"]
        assert np.array_equal(coco.decode(encoded).astype(bool), masks[0])

    def test_to_json_holds_everything_but_the_arrays(self):
        result = make_result(num_targets=2, format_violations=("no_reasoning",))
        data = json.loads(json.dumps(result.to_json()))
        assert data["found"] is True
        assert data["instruction"] == "the “red” disc"
        assert data["stop_reason"] == "targets_reached"
        assert data["image_size"] == [HEIGHT, WIDTH]
        assert data["areas"] == result.areas.tolist()
        assert data["boxes"] == result.boxes.tolist()
        assert data["scores"] == result.scores.tolist()
        assert data["format_violations"] == ["no_reasoning"]
        assert data["timings"] == dataclasses.asdict(result.timings)
        omitted = {"_prior_logits", "_mask_logits", "image"}
        assert {f.name for f in dataclasses.fields(SegmentationResult)} - omitted <= set(data)

    @PYCOCOTOOLS_DECODES
    def test_to_coco_gives_results_that_match_the_masks(self):
        result = make_result(num_targets=2)
        results = json.loads(json.dumps(result.to_coco(image_id=42, category_id=3)))
        assert len(results) == 2
        for entry, mask, score in zip(results, result.masks, result.scores, strict=True):
            assert (entry["image_id"], entry["category_id"]) == (42, 3)
            assert np.array_equal(coco.decode(entry["segmentation"]).astype(bool), mask)
            assert entry["bbox"] == coco.toBbox(entry["segmentation"]).tolist()
            assert entry["area"] == coco.area(entry["segmentation"])
            assert entry["score"] == score

    def test_to_coco_without_a_match_is_empty(self):
        assert make_result(num_targets=0).to_coco() == []

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("num_targets", [0, 2])
    def test_to_supervision_gives_detections(self, num_targets):
        supervision = pytest.importorskip("supervision")
        result = make_result(num_targets)
        detections = result.to_supervision()
        assert isinstance(detections, supervision.Detections)
        assert len(detections) == num_targets
        np.testing.assert_array_equal(detections.xyxy, result.boxes)
        np.testing.assert_array_equal(detections.mask, result.masks)
        np.testing.assert_allclose(detections.confidence, result.scores, rtol=1e-6)
        assert list(detections.data["class_name"]) == [result.instruction] * num_targets

    def test_to_supervision_without_the_package_names_the_pip_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(MissingDependencyError, match=re.escape(install_hint("supervision"))):
            make_result().to_supervision()

    def test_plot_is_the_overlay_with_the_instruction(self):
        result = make_result(2)
        expected = draw_overlay(result.image, result.masks, result.instruction)
        np.testing.assert_array_equal(np.asarray(result.plot()), np.asarray(expected))


class TestSave:
    @pytest.mark.parametrize("num_targets", [0, 1, 2])
    def test_save_writes_overlay_masks_priors_and_json(self, tmp_path, num_targets):
        result = make_result(num_targets)
        directory = tmp_path / "new" / "result"
        written = result.save(directory)
        suffixes = [""] if num_targets < 2 else ["-1", "-2"]
        names = {f"{kind}{suffix}" for kind in ("mask", "prior") for suffix in suffixes}
        assert set(written) == {"overlay", "result", *names}
        assert {path.name for path in directory.iterdir()} == {p.name for p in written.values()}
        masks = result.masks if num_targets else result.mask[None]
        for suffix, mask in zip(suffixes, masks, strict=True):
            with Image.open(written[f"mask{suffix}"]) as image:
                assert (image.mode, image.size) == ("L", (WIDTH, HEIGHT))
                assert np.array_equal(np.asarray(image), mask * np.uint8(255))
            with Image.open(written[f"prior{suffix}"]) as image:
                assert image.mode == "RGB"
        text = written["result"].read_text(encoding="utf-8")
        assert json.loads(text) == result.to_json()
        assert "“red”" in text  # not escaped
        assert text.endswith("}\n")

    def test_save_twice_replaces_the_files(self, tmp_path):
        make_result().save(tmp_path)
        make_result(reasoning="another text").save(str(tmp_path))
        saved = json.loads((tmp_path / "result.json").read_text())
        assert saved["reasoning"] == "another text"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            make_result(masks=np.ones((1, HEIGHT, WIDTH), dtype=bool)),
            "SegmentationResult(1 mask covering 100.0% of 50x30, targets_reached, 12 ms, "
            "reasoning='the red disc is on the left')",
        ),
        (
            make_result(2, masks=np.zeros((2, HEIGHT, WIDTH), dtype=bool), reasoning="x" * 61),
            "SegmentationResult(2 masks covering 0.0%, 0.0% of 50x30, targets_reached, 12 ms, "
            f"reasoning='{'x' * 57}...')",
        ),
        (
            make_result(0, reasoning="x" * 60),
            "SegmentationResult(nothing found in 50x30, end_of_text, 12 ms, "
            f"reasoning='{'x' * 60}')",
        ),
    ],
)
def test_repr_is_one_short_line(result, text):
    assert repr(result) == text


def test_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_result().response = ""


@pytest.mark.parametrize(
    "make",
    [make_result, lambda: PriorEvent(random_logits(np.random.default_rng(0)))],
    ids=["result", "prior"],
)
def test_result_and_prior_are_compared_by_identity(make):
    first, second = make(), make()
    assert first == first
    assert first != second
    assert len({first, second}) == 2
