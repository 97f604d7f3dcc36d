"""``SegmentBatch``: rows in, rows out."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from coprs_deploy.batch import InputRow, SegmentBatch, SourceColumns, segment_batch
from coprs_deploy.batch.segment_batch import bundle_fingerprint, group_by_image
from coprs_deploy.data.rle import decode_mask
from coprs_deploy.version import __version__
from tests.unit.runtime_fakes import FakePolicy


def row(number, location, instruction="a ring", **others):
    return InputRow(number, f"id{number}", str(location), instruction, str(location), **others)


class Together(FakePolicy):
    """Answers requests that are given together."""

    answers_together = True


@pytest.fixture(params=["one by one", "together"])
def opener(request, open_batch):
    """Return ``open_batch`` for a policy that takes one request at a time, or all of them."""
    kind = Together if request.param == "together" else FakePolicy
    return lambda found=None, **options: open_batch(kind(found=found), **options)


@pytest.mark.parametrize("policy", [FakePolicy(), FakePolicy(concurrency=4), Together()])
def test_rows_on_an_image_share_its_embedding(open_batch, images, policy):
    batch, runners = open_batch(policy)
    names = ["a.png", "c.png", "a.png", "d.png", "c.png", "a.png"]
    found = batch([row(n, images / name, f"ask {n}") for n, name in enumerate(names)])
    assert [each.row for each in found] == list(range(6))
    assert [each.instruction for each in found] == [f"ask {n}" for n in range(6)]
    assert runners["image_encoder"].calls == 3


def test_images_that_do_not_fit_into_memory_together_are_segmented_in_turn(
    open_batch, images, monkeypatch
):
    monkeypatch.setattr(segment_batch, "MAX_IMAGE_BYTES", 2 * 20 * 30 * 3)
    batch, runners = open_batch(Together())
    calls, together = [], batch._coprs.segment_together

    def counted(requests, *limits):
        calls.append(len({id(image) for image, _ in requests}))
        return together(requests, *limits)

    monkeypatch.setattr(batch._coprs, "segment_together", counted)
    names = ["a.png", "a.png", "b.jpg", "c.png", "missing.png", "d.png", "more/e.png"]
    found = batch([row(n, images / name) for n, name in enumerate(names)])
    assert [each.found for each in found] == [True] * 4 + [False] + [True] * 2
    assert calls == [2, 2, 1]
    assert runners["image_encoder"].calls == 5


def test_rows_without_a_cache_of_embeddings_are_segmented(open_batch, images):
    batch, _ = open_batch()
    assert all(each.found for each in batch([row(0, images / "a.png"), row(1, images / "a.png")]))


def test_row_has_masks_boxes_scores_and_provenance(opener, images):
    batch, _ = opener()
    (found,) = batch([row(3, images / "a.png", image_id="9")])
    assert (found.row, found.id, found.image_id, found.found) == (3, "id3", "9", True)
    mask = decode_mask(found.masks[0], 20, 30)
    assert found.areas == [int(mask.sum())] == [600]
    assert found.boxes == [[0, 0, 30, 20]]
    assert found.image_size == [20, 30]
    assert found.response == "some text"
    assert found.timings["total_ms"] > 0
    assert (found.bundle, found.version) == (bundle_fingerprint(None), __version__)
    assert found.runtime.startswith("graphs: fake")
    assert (found.error, found.error_type) == ("", "")


def test_no_match_is_a_result_and_no_error(opener, images):
    batch, _ = opener(found=0)
    (found,) = batch([row(0, images / "a.png")])
    assert (found.found, found.masks, found.boxes, found.error) == (False, [], [], "")


def test_failed_row_is_a_row_with_its_error(opener, images):
    (images / "broken.png").write_bytes(b"no image")
    batch, _ = opener()
    found = batch(
        [
            row(0, images / "missing.png"),
            row(1, images / "broken.png"),
            row(2, images / "a.png", "x" * 100_000),
            row(3, "", problem="the line is not valid JSON"),
            row(4, images / "a.png"),
        ]
    )
    kinds = ["FileNotFoundError", "ImageDecodeError", "InstructionError", "ValueError", ""]
    assert [each.error_type for each in found] == kinds
    assert [bool(each.error) for each in found] == [True] * 4 + [False]
    assert [each.found for each in found] == [False] * 4 + [True]
    assert found[3].error == "the line is not valid JSON"


def test_error_of_the_policy_ends_one_row(open_batch, images):
    calls = []

    def fail_once():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")

    batch, _ = open_batch(FakePolicy(deltas=("text",), during=fail_once))
    found = batch([row(n, images / name) for n, name in enumerate(["a.png", "c.png", "d.png"])])
    assert sorted(each.error for each in found) == ["", "", "out of memory"]


def test_bytes_of_an_image_are_segmented_and_grouped(opener, images):
    content = (images / "a.png").read_bytes()
    rows = [InputRow(n, str(n), "x", "a ring", content=bytes(content)) for n in range(3)]
    batch, runners = opener()
    assert all(each.found for each in batch(rows))
    assert runners["image_encoder"].calls == len(group_by_image(rows)) == 1


def test_masks_are_saved_by_row_and_target(opener, images, tmp_path):
    batch, _ = opener(max_targets=2, mask_folder=tmp_path / "masks")
    (found,) = batch([row(12, images / "a.png")])
    assert found.mask_files == ["000000012-1.png", "000000012-2.png"]
    for name, mask in zip(found.mask_files, found.masks, strict=True):
        with Image.open(tmp_path / "masks" / name) as image:
            np.testing.assert_array_equal(np.array(image) > 0, decode_mask(mask, 20, 30))


def test_no_rows_are_no_rows(open_batch):
    batch, _ = open_batch()
    assert batch([]) == []


def test_path_that_is_not_utf_8_is_stored_as_escapes(open_batch, images):
    batch, _ = open_batch()
    (found,) = batch([row(0, images / "b\udcff.png")])
    assert found.image.endswith("b\\udcff.png")
    assert found.error_type == "FileNotFoundError"


@pytest.mark.parametrize("kind", ["path", "bytes", "struct", "array"])
def test_batch_of_columns_gives_a_table_with_its_other_columns(opener, images, monkeypatch, kind):
    monkeypatch.chdir(images)
    data = (images / "c.png").read_bytes()
    image = {
        "path": "c.png",
        "bytes": data,
        "struct": {"bytes": data, "path": "c.png"},
        "array": np.full((20, 30, 3), 80, np.uint8),
    }[kind]
    column = np.empty(2, dtype=object)
    column[:] = [image, "missing.png"]
    batch, runners = opener()
    texts = np.empty(2, dtype=object)
    texts[:] = [np.array(["one", "two"], dtype=object), "three"]
    table = batch({"image": column, "instruction": texts, "label": np.array([7, 8])})
    assert table["instruction"].to_pylist() == ["one", "two", "three"]
    assert table["label"].to_pylist() == [7, 7, 8]
    assert table["id"].to_pylist() == ["0#1", "0#2", "1"]
    assert table["found"].to_pylist() == [True, True, False]
    assert table["areas"].to_pylist() == [[600], [600], []]
    assert table["error_type"].to_pylist() == ["", "", "FileNotFoundError"]
    assert runners["image_encoder"].calls == 1
    assert "image_path" not in table.column_names


def test_batch_of_columns_takes_fixed_instructions_and_named_columns(opener, images):
    columns = SourceColumns(("a ring", "a cup"), image_column="file")
    batch, _ = opener(columns=columns)
    table = batch({"file": [str(images / "a.png")], "image_id": [9]})
    assert table["instruction"].to_pylist() == ["a ring", "a cup"]
    assert table["image_id"].to_pylist() == ["9", "9"]
    assert "file" not in table.column_names
    assert batch({"file": []}).num_rows == 0


def test_batch_of_columns_runs_in_the_one_thread_that_ray_data_gives_a_class(opener, images):
    """Ray Data overrides ``__call__`` to send each call to a single thread."""
    with ThreadPoolExecutor(1) as thread:

        class InOneThread(SegmentBatch):
            def __call__(self, rows):
                return thread.submit(SegmentBatch.__call__, self, rows).result(timeout=20)

        batch, _ = opener()
        batch.__class__ = InOneThread
        table = batch({"image": [str(images / "a.png")], "instruction": ["a ring"]})
    assert table["found"].to_pylist() == [True]
