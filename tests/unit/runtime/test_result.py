"""An answer as a value: what it shows, what it writes, and what can be read back."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from coprs_deploy.images import prepare_image, resize_logits
from coprs_deploy.runtime import PriorEvent, SegmentationResult, Timings
from coprs_deploy.runtime.result import LowResolutionLogits
from coprs_deploy.specs import Geometry

HEIGHT, WIDTH = 30, 50
GEOMETRY = Geometry(image_size=64, patch_size=8, out_chans=8)

PYCOCOTOOLS_DECODES = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
"""The package only encodes; decoding in pycocotools 2.0 warns under numpy 2."""


def make_maps(generator, targets=1):
    side = GEOMETRY.mask_size
    logits = 4 * generator.standard_normal((targets, 1, side, side), dtype=np.float32)
    prepared = prepare_image(np.zeros((HEIGHT, WIDTH, 3), np.uint8), GEOMETRY)
    return LowResolutionLogits.of(logits, prepared, GEOMETRY)


def make_answer(targets=1, **changes):
    generator = np.random.default_rng(0)
    prior_maps, mask_maps = (make_maps(generator, targets) for _ in range(2))
    values = {
        "found": targets > 0,
        "masks": mask_maps.at_original_size > 0,
        "mask_maps": mask_maps,
        "prior_maps": prior_maps,
        "reasoning": "the red disc is on the left",
        "response": "<think>the red disc is on the left</think><REF_POS>",
        "reason": "" if targets else "no <REF_POS> was written: the policy ended its answer",
        "format_faults": (),
        "instruction": "the “red” disc",
        "timings": Timings(total_ms=12.4, response_tokens=9),
        "runtime": "graphs: one; policy: another",
        "image": generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
    }
    return SegmentationResult(**{**values, **changes})


def test_the_last_target_counts():
    answer = make_answer(targets=3)
    assert np.array_equal(answer.mask, answer.masks[2])
    assert np.array_equal(answer.prior, answer.priors[2])
    assert not np.array_equal(answer.masks[1], answer.masks[2])


def test_logits_come_to_the_size_of_the_picture_when_they_are_looked_at(monkeypatch):
    answer = make_answer(targets=2)
    calls = []

    def resize(logits, placed, geometry):
        calls.append(logits)
        return resize_logits(logits, placed, geometry)

    monkeypatch.setattr("coprs_deploy.runtime.result.resize_logits", resize)
    fresh = dataclasses.replace(answer, prior_maps=make_maps(np.random.default_rng(1), 2))
    assert not calls
    assert fresh.priors.shape == (2, HEIGHT, WIDTH)
    assert fresh.prior is not None and PriorEvent(fresh.prior_maps).priors is fresh.priors
    assert len(calls) == 1 and calls[0] is fresh.prior_maps.logits


def test_masks_are_cut_from_their_logits():
    answer = make_answer(targets=2)
    assert answer.mask_logits.shape == answer.masks.shape
    assert np.array_equal(answer.masks, answer.mask_logits > 0)


def test_nothing_found_gives_an_empty_mask_and_a_prior_without_hope():
    answer = make_answer(targets=0)
    assert not answer.found
    assert answer.mask.shape == answer.prior.shape == (HEIGHT, WIDTH)
    assert answer.mask.dtype == np.bool_
    assert not answer.mask.any()
    assert answer.prior.dtype == np.float32
    assert (answer.prior == -50).all()
    assert answer.rle() == []


@PYCOCOTOOLS_DECODES
@pytest.mark.parametrize("targets", [1, 2])
def test_run_lengths_decode_back_to_the_masks(targets):
    answer = make_answer(targets)
    encoded = json.loads(json.dumps(answer.rle()))
    assert [entry["size"] for entry in encoded] == [[HEIGHT, WIDTH]] * targets
    for entry, mask in zip(encoded, answer.masks, strict=True):
        assert np.array_equal(coco.decode(entry).astype(bool), mask)


@PYCOCOTOOLS_DECODES
@pytest.mark.parametrize("value", [False, True])
def test_run_lengths_hold_for_empty_and_full_masks(value):
    masks = np.full((1, HEIGHT, WIDTH), value)
    (encoded,) = make_answer(masks=masks).rle()
    assert np.array_equal(coco.decode(encoded).astype(bool), masks[0])


def test_json_holds_everything_but_the_arrays():
    answer = make_answer(targets=2, format_faults=("no thought is marked",))
    data = json.loads(json.dumps(answer.to_json()))
    assert data["found"] is True
    assert data["instruction"] == "the “red” disc"
    assert data["image_size"] == [HEIGHT, WIDTH]
    assert data["mask_pixels"] == [int(mask.sum()) for mask in answer.masks]
    assert data["format_faults"] == ["no thought is marked"]
    assert data["timings"] == dataclasses.asdict(answer.timings)
    assert data["masks"] == answer.rle()
    left_out = {"prior_maps", "mask_maps", "image"}
    assert {f.name for f in dataclasses.fields(SegmentationResult)} - left_out <= set(data)


@pytest.mark.parametrize("targets", [0, 1, 2])
def test_what_is_saved_is_what_was_answered(tmp_path, targets):
    answer = make_answer(targets)
    directory = tmp_path / "new" / "answer"
    written = answer.save(directory)
    suffixes = [""] if targets < 2 else ["-1", "-2"]
    names = {f"{kind}{suffix}" for kind in ("mask", "prior") for suffix in suffixes}
    assert set(written) == {"overlay", "result", *names}
    assert {path.name for path in directory.iterdir()} == {p.name for p in written.values()}
    masks = answer.masks if targets else answer.mask[None]
    for suffix, mask in zip(suffixes, masks, strict=True):
        with Image.open(written[f"mask{suffix}"]) as picture:
            assert (picture.mode, picture.size) == ("L", (WIDTH, HEIGHT))
            assert np.array_equal(np.asarray(picture), mask * np.uint8(255))
        with Image.open(written[f"prior{suffix}"]) as picture:
            assert picture.mode == "RGB"
    text = written["result"].read_text(encoding="utf-8")
    assert json.loads(text) == answer.to_json()
    assert "“red”" in text  # letters are kept for people, not escaped
    assert text.endswith("}\n")


def test_saving_again_replaces_the_files(tmp_path):
    make_answer().save(tmp_path)
    other = make_answer(reasoning="another thought")
    other.save(str(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text())["reasoning"] == "another thought"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            make_answer(masks=np.ones((1, HEIGHT, WIDTH), dtype=bool)),
            "SegmentationResult(1 mask covering 100.0% of 50x30, 12 ms, "
            "reasoning='the red disc is on the left')",
        ),
        (
            make_answer(2, masks=np.zeros((2, HEIGHT, WIDTH), dtype=bool), reasoning="x" * 61),
            f"SegmentationResult(2 masks covering 0.0%, 0.0% of 50x30, 12 ms, reasoning='{'x' * 57}...')",
        ),
        (
            make_answer(0, reasoning="x" * 60),
            "SegmentationResult(nothing found: no <REF_POS> was written: the policy ended its answer; 50x30, "
            f"reasoning='{'x' * 60}')",
        ),
    ],
)
def test_an_answer_in_a_shell_is_one_short_line(answer, text):
    assert repr(answer) == text


def test_an_answer_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_answer().found = False


@pytest.mark.parametrize(
    "make",
    [
        make_answer,
        lambda: PriorEvent(make_maps(np.random.default_rng(0))),
    ],
    ids=["answer", "prior"],
)
def test_what_holds_arrays_is_compared_by_identity(make):
    first, second = make(), make()
    assert first == first
    assert first != second
    assert len({first, second}) == 2
