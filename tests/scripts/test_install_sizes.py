"""Sizes of the extras in the README: what is written is what is installed here."""

import importlib.metadata

import pytest

from tests import ROOT
from tests.scripts import load_script

install_sizes = load_script(".ci/install_sizes.py")
TABLE = '| extras | size |\n|---|---|\n| `".[edge]"` | 340 MB | a |\n| `".[gpu,torch]"` | 9 GB |\n'


def test_sizes_are_written_into_their_rows():
    sizes = {"edge": 308_300_000, "gpu,torch": None}
    written = install_sizes.with_sizes(TABLE, sizes.get)
    assert '| `".[edge]"` | 310 MB | a |\n' in written
    assert '| `".[gpu,torch]"` | not measured |\n' in written
    assert install_sizes.stale_rows(written, sizes.get) == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(94_000_000, "90 MB"), (996_000_000, "1.0 GB"), (1_378_000_000, "1.4 GB")],
)
def test_sizes_have_two_digits(num_bytes, text):
    assert install_sizes.format_size(num_bytes) == text


def test_rows_that_are_off_are_listed():
    rows = install_sizes.stale_rows(TABLE, {"edge": 308_300_000, "gpu,torch": None}.get)
    assert [row.partition(":")[0] for row in rows] == ["[edge]", "[gpu,torch]"]


def test_required_packages_follow_extras_of_extras(monkeypatch):
    needs = {
        "a": ["b[y]>=1; extra == 'x'", "c; extra == 'other'", "A[x]; extra == 'all'"],
        "b": ["d", "e; extra == 'y'", "f; python_version < '3'"],
    }

    class Distribution:
        def __init__(self, name):
            self.requires = needs.get(name)

    monkeypatch.setattr(importlib.metadata, "distribution", Distribution)
    assert install_sizes.required_packages("a", ["all"]) == {"b", "d", "e"}
    assert install_sizes.required_packages("a", []) == set()


def test_the_readme_has_the_sizes_of_this_environment():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [extras for _, extras, _ in install_sizes.ROW.findall(text) if "gpu" not in extras]
    assert len(missing) >= 5
    if any(install_sizes.extras_bytes(extras) is None for extras in missing):
        pytest.skip("not all extras are installed; `make test` installs them")
    assert install_sizes.stale_rows(text, install_sizes.extras_bytes) == []
