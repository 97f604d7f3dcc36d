"""What int8 is calibrated on: the pictures of a folder, and the ranges that are found on them."""

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
    find_pictures,
)
from coprs_deploy.specs import Geometry

GEOMETRY = Geometry(image_size=32, patch_size=8, out_chans=8)


@pytest.fixture
def folder(tmp_path):
    """Nine files: eight different pictures, one of them twice, and a text beside them."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        name = root / ("more" if number % 2 else ".") / f"{number}.{'png' if number % 3 else 'BMP'}"
        Image.fromarray(pixels).save(name)
    shutil.copy(root / "more/1.png", root / "again.png")
    (root / "notes.txt").write_text("no picture")
    return root


class TestPictures:
    def test_each_is_taken_once_and_a_quarter_is_held_out(self, folder):
        found = find_pictures(folder)
        assert (len(found.used), len(found.held_out)) == (6, 2)
        contents = {path.read_bytes() for path in (*found.used, *found.held_out)}
        assert len(contents) == 8
        record = found.record()
        assert (record.pictures, record.held_out, record.sha256) == (6, 2, found.sha256)

    def test_contents_decide_and_names_do_not(self, folder, tmp_path):
        found = find_pictures(folder)
        renamed = tmp_path / "renamed"
        renamed.mkdir()
        for number, path in enumerate(reversed((*found.used, *found.held_out))):
            shutil.copy(path, renamed / f"{number}.png")
        again = find_pictures(renamed)
        assert again.sha256 == found.sha256
        assert [p.read_bytes() for p in again.held_out] == [p.read_bytes() for p in found.held_out]

    def test_another_picture_is_another_set(self, folder):
        before = find_pictures(folder).sha256
        Image.new("RGB", (5, 5)).save(folder / "more.png")
        assert find_pictures(folder).sha256 != before

    def test_few_are_held_out_of_many(self, folder):
        for number in range(40):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"plain-{number}.png")
        found = find_pictures(folder)
        assert (len(found.used), len(found.held_out)) == (44, 4)

    def test_too_few_are_refused(self, folder):
        for path in (folder / "more").iterdir():
            path.unlink()
        (folder / "0.BMP").unlink()
        (folder / "again.png").unlink()
        with pytest.raises(ValueError, match=r"3 different pictures .* at least 4, better 32"):
            find_pictures(folder)
        with pytest.raises(ValueError, match="is no folder"):
            find_pictures(folder / "2.png")


class Fixed(nn.Module):
    """An encoder whose products see what the test gives, whatever the picture is."""

    def __init__(self, *inputs):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self._inputs = iter(inputs)

    def forward(self, image):
        values = next(self._inputs)
        self.first(values.reshape(-1, 4))
        self.second(-2 * values.reshape(-1, 4))


def ranges_of(folder, *inputs):
    pictures = [folder / "2.png"] * len(inputs)
    return calibrate(Fixed(*inputs), ["first", "second"], pictures, GEOMETRY)


class TestRanges:
    def test_the_largest_value_of_all_pictures_counts_whatever_the_order(self, folder):
        values = [torch.full((8,), value) for value in (0.0, 1.0, -9.0, 3.0)]
        found = ranges_of(folder, *values)
        assert found["first"].largest == 9.0
        assert found["second"].largest == 18.0

    def test_the_error_is_that_of_rounding_and_clipping(self, folder):
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

    def test_a_lone_outlier_is_clipped_and_a_flat_distribution_is_not(self, folder):
        flat = torch.linspace(-1, 1, 40_000)
        lone = torch.cat([flat, torch.tensor([10.0, 0, 0, 0])])
        assert ranges_of(folder, flat)["first"].limit == pytest.approx(1, rel=0.02)
        found = ranges_of(folder, flat, lone)["first"]
        assert found.largest == 10
        # N values rounded to steps of L/127 against one that is cut from 10 to L
        best = 10 / (1 + 80_004 / (12 * 127**2))
        assert found.limit == pytest.approx(best, rel=0.03)

    def test_an_input_of_zeros_has_a_range(self, folder):
        assert ranges_of(folder, torch.zeros(8))["first"] == ProductRange(0.0, 1.0, 0.0)

    @pytest.mark.parametrize("value", [np.inf, np.nan])
    def test_values_that_are_not_finite_are_refused(self, folder, value):
        with pytest.raises(ValueError, match="not finite at first"):
            ranges_of(folder, torch.ones(4), torch.full((4,), value), torch.ones(4))

    def test_hooks_are_taken_off_again(self, folder):
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

    def test_ranges_are_measured_once_a_graph_and_set_of_pictures(self, folder, tmp_path):
        cache, calls = Cache(tmp_path / "cache"), []
        pictures = find_pictures(folder)

        def ask(graph, value):
            return cached_ranges(cache, graph, pictures, lambda: self.measured(value, calls))

        first = ask("a" * 64, 1.0)
        assert ask("a" * 64, 2.0) == first
        assert ask("b" * 64, 3.0)["first"].largest == 3.0
        Image.new("RGB", (5, 5)).save(folder / "more.png")
        pictures = find_pictures(folder)
        assert ask("a" * 64, 4.0)["first"].largest == 4.0
        assert calls == [1.0, 3.0, 4.0]

    def test_other_code_and_damaged_files_are_not_trusted(self, folder, tmp_path, monkeypatch):
        cache, calls = Cache(tmp_path / "cache"), []
        pictures = find_pictures(folder)

        def ask(value):
            return cached_ranges(cache, "a" * 64, pictures, lambda: self.measured(value, calls))

        ask(1.0)
        (kept,) = (cache.root / "calibration").iterdir()
        kept.write_bytes(kept.read_bytes()[:-5])
        assert ask(2.0)["first"].largest == 2.0
        monkeypatch.setattr(calibration, "CALIBRATION_REVISION", 99)
        assert ask(3.0)["first"].largest == 3.0
        assert calls == [1.0, 2.0, 3.0]
