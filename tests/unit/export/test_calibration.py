"""int8 calibration: images of a directory, and the ranges measured on them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from coprs_deploy.engines.cache import Cache
from coprs_deploy.errors import ImageDecodeError
from coprs_deploy.export import calibration
from coprs_deploy.export.calibration import (
    ProductRange,
    cached_ranges,
    calibrate,
    check_calibration_images,
    find_calibration_images,
)
from coprs_deploy.specs import Geometry

GEOMETRY = Geometry(image_size=32, patch_size=8, out_chans=8)


@pytest.fixture
def folder(tmp_path):
    """Nine files: eight different images, one of them twice, and a text beside them."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        name = root / ("more" if number % 2 else ".") / f"{number}.{'png' if number % 3 else 'BMP'}"
        Image.fromarray(pixels).save(name)
    shutil.copy(root / "more/1.png", root / "again.png")
    (root / "notes.txt").write_text("no image")
    return root


class TestImages:
    def test_find_images_skips_duplicates_and_holds_out_a_quarter(self, folder):
        found = find_calibration_images(folder)
        assert (len(found.used), len(found.held_out)) == (6, 2)
        contents = {path.read_bytes() for path in (*found.used, *found.held_out)}
        assert len(contents) == 8
        record = found.record()
        assert (record.num_images, record.num_held_out, record.sha256) == (6, 2, found.sha256)

    def test_find_images_depends_on_contents_not_names(self, folder, tmp_path):
        found = find_calibration_images(folder)
        renamed = tmp_path / "renamed"
        renamed.mkdir()
        for number, path in enumerate(reversed((*found.used, *found.held_out))):
            shutil.copy(path, renamed / f"{number}.png")
        again = find_calibration_images(renamed)
        assert again.sha256 == found.sha256
        assert [p.read_bytes() for p in again.held_out] == [p.read_bytes() for p in found.held_out]

    def test_check_images_unreadable_one_is_named(self, folder):
        check_calibration_images(find_calibration_images(folder), GEOMETRY, None)
        (folder / "broken.png").write_bytes((folder / "more/1.png").read_bytes()[:60])
        with pytest.raises(ImageDecodeError, match=r"broken\.png"):
            check_calibration_images(find_calibration_images(folder), GEOMETRY, None)

    def test_find_images_other_image_changes_hash(self, folder):
        before = find_calibration_images(folder).sha256
        Image.new("RGB", (5, 5)).save(folder / "more.png")
        assert find_calibration_images(folder).sha256 != before

    def test_find_images_holds_out_at_most_four(self, folder):
        for number in range(40):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"plain-{number}.png")
        found = find_calibration_images(folder)
        assert (len(found.used), len(found.held_out)) == (44, 4)

    def test_find_images_too_few_are_refused(self, folder):
        for path in (folder / "more").iterdir():
            path.unlink()
        (folder / "0.BMP").unlink()
        (folder / "again.png").unlink()
        with pytest.raises(ValueError, match=r"3 different images; .* at least 4, better 32"):
            find_calibration_images(folder)
        with pytest.raises(ValueError, match="accepted: a directory"):
            find_calibration_images(folder / "2.png")


class Fixed(nn.Module):
    """An encoder whose linear layers get given inputs, independent of the image."""

    def __init__(self, *inputs):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self._inputs = iter(inputs)

    def forward(self, image):
        values = next(self._inputs)
        self.first(values.reshape(-1, 4))
        self.second(-2 * values.reshape(-1, 4))


def ranges_of(folder, *inputs):
    images = [folder / "2.png"] * len(inputs)
    return calibrate(Fixed(*inputs), ["first", "second"], images, GEOMETRY)


class TestRanges:
    def test_calibrate_largest_value_is_independent_of_order(self, folder):
        values = [torch.full((8,), value) for value in (0.0, 1.0, -9.0, 3.0)]
        found = ranges_of(folder, *values)
        assert found["first"].largest == 9.0
        assert found["second"].largest == 18.0

    def test_calibrate_error_equals_rounding_and_clipping(self, folder):
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(40_000, generator=generator) * size for size in (0.5, 1, 2)]
        found = ranges_of(folder, *parts)["first"]
        values = torch.cat(parts)

        def error(limit):
            rounded = (values * 127 / limit).round().clamp(-127, 127) * limit / 127
            return float((rounded - values).norm() / values.norm())

        assert found.error == pytest.approx(error(found.limit), rel=0.03)
        assert error(found.limit) <= min(error(found.largest), error(found.largest / 3))
        assert 0.3 * found.largest < found.limit < found.largest

    def test_calibrate_clips_outlier_but_not_flat_distribution(self, folder):
        flat = torch.linspace(-1, 1, 40_000)
        lone = torch.cat([flat, torch.tensor([10.0, 0, 0, 0])])
        assert ranges_of(folder, flat)["first"].limit == pytest.approx(1, rel=0.02)
        found = ranges_of(folder, flat, lone)["first"]
        assert found.largest == 10
        # N values rounded to steps of L/127 against one that is cut from 10 to L
        best = 10 / (1 + 80_004 / (12 * 127**2))
        assert found.limit == pytest.approx(best, rel=0.03)

    def test_calibrate_zero_input_has_range(self, folder):
        assert ranges_of(folder, torch.zeros(8))["first"] == ProductRange(0.0, 1.0, 0.0)

    @pytest.mark.parametrize("value", [np.inf, np.nan])
    def test_calibrate_nonfinite_values_are_refused(self, folder, value):
        with pytest.raises(ValueError, match="not finite at first"):
            ranges_of(folder, torch.ones(4), torch.full((4,), value), torch.ones(4))

    def test_calibrate_removes_hooks(self, folder):
        encoder = Fixed(torch.ones(4))
        calibrate(encoder, ["first"], [folder / "2.png"], GEOMETRY)
        assert not encoder.first._forward_pre_hooks
        with pytest.raises(ImageDecodeError):
            calibrate(encoder, ["first"], [folder / "notes.txt"], GEOMETRY)
        assert not encoder.first._forward_pre_hooks


class TestCache:
    def measured(self, value, calls):
        calls.append(value)
        return {"first": ProductRange(value, value, 0.1)}

    def test_cached_ranges_are_measured_once_per_graph_and_images(self, folder, tmp_path):
        cache, calls = Cache(tmp_path / "cache"), []
        images = find_calibration_images(folder)

        def ranges(graph, value):
            return cached_ranges(cache, graph, images, lambda: self.measured(value, calls))

        first = ranges("a" * 64, 1.0)
        assert ranges("a" * 64, 2.0) == first
        assert ranges("b" * 64, 3.0)["first"].largest == 3.0
        Image.new("RGB", (5, 5)).save(folder / "more.png")
        images = find_calibration_images(folder)
        assert ranges("a" * 64, 4.0)["first"].largest == 4.0
        assert calls == [1.0, 3.0, 4.0]

    def test_cached_ranges_of_other_revision_or_damaged_are_measured_again(
        self, folder, tmp_path, monkeypatch
    ):
        cache, calls = Cache(tmp_path / "cache"), []
        images = find_calibration_images(folder)

        def ranges(value):
            return cached_ranges(cache, "a" * 64, images, lambda: self.measured(value, calls))

        ranges(1.0)
        (kept,) = (cache.root / "calibration").iterdir()
        kept.write_bytes(kept.read_bytes()[:-5])
        assert ranges(2.0)["first"].largest == 2.0
        monkeypatch.setattr(calibration, "CALIBRATION_REVISION", 99)
        assert ranges(3.0)["first"].largest == 3.0
        assert calls == [1.0, 2.0, 3.0]
