"""Pages of mapped weight files."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from coprs_deploy.engines import mapped_weights
from coprs_deploy.engines.mapped_weights import MappedWeights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def resident_kb(file):
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf" {re.escape(str(file))}\n(?:.+\n)*?Rss: +(\d+) kB", smaps)
    return int(found[1])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "decoder (1).bin"
    np.arange(1 << 18, dtype=np.int32).tofile(path)
    return path


def test_release_gives_back_the_pages_and_keeps_the_content(file, monkeypatch):
    monkeypatch.setattr(mapped_weights, "LARGE_BYTES", 1 << 20)
    mapped = np.memmap(file, np.int32, "r")
    total = mapped.sum(dtype=np.int64)
    assert resident_kb(file) == 1024
    MappedWeights(file).release()
    assert resident_kb(file) == 0
    assert mapped.sum(dtype=np.int64) == total


def test_release_leaves_a_mapping_that_may_be_written_to(file, monkeypatch):
    monkeypatch.setattr(mapped_weights, "LARGE_BYTES", 1 << 20)
    mapped = np.memmap(file, np.int32, "c")  # changes are private
    mapped[:] = 7
    MappedWeights(file).release()
    assert (mapped == 7).all()


def test_release_leaves_a_small_file(file):
    mapped = np.memmap(file, np.int32, "r")
    mapped.sum()
    MappedWeights(file).release()
    assert resident_kb(file) == 1024


def test_release_of_a_missing_file_does_nothing(tmp_path):
    MappedWeights(tmp_path / "decoder.bin").release()
